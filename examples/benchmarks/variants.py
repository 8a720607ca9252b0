r"""
Measure the variants of the paper's design space: parameters, FLOPs, and time and memory of a training step.

    python examples/benchmarks/variants.py [--steps 15] [--device cpu] [--hidden-size 512 --num-hidden-layers 2 ...]

    # shapes of the paper's Tables 1, 3 and 4 (with a dense MLP): only parameters and FLOPs, which need no memory
    python examples/benchmarks/variants.py --steps 0 --hidden-size 2048 --num-hidden-layers 24 \
        --num-attention-heads 32 --num-key-value-heads 4 --head-dim 128 --intermediate-size 6144 \
        --vocab-size 151936 --sequence-length 512

Symbols in formulas: X is the input of the attention block, x the input of a block. Q, K, V and Y are queries, keys,
values and attention output of a head. O is the output of o_proj, F is attention or MLP. W_h and w_h are weights of a
head. W and w are weights that all heads share. Capitals have a gate per channel. G, U and D are weights of the MLP.
Biases are omitted.

FLOPs count the matmuls of a forward pass. A training step is forward, backward and AdamW on random tokens. Steps of a
variant and of the baseline take turns in the same process, and the table shows the median ratio. Memory is the peak of
a process for the variant alone, without imports, or the peak that torch allocates on a CUDA device. Rows that compute
the same function as the baseline show the noise.
"""

import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Annotated, Any

import torch
import typer
from huggingface_hub.errors import StrictDataclassError
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM


@dataclass(frozen=True)
class Variant:
    """Formula of a variant, and its fields of `GatedLlamaConfig`."""

    formula: str
    fields: dict[str, Any] = field(default_factory=dict)


def gated(formula: str, *positions: str, **fields: Any) -> Variant:
    """Return a variant with gates at `positions`, elementwise unless `fields` set another granularity."""
    gate_fields = {name if name.startswith("use_") else f"gate_{name}": value for name, value in fields.items()}
    return Variant(formula, {"gate_position": list(positions), "gate_granularity": "elementwise"} | gate_fields)


def ungated(formula: str, **fields: Any) -> Variant:
    """Return a variant without gates."""
    return Variant(formula, {"gate_position": [], **fields})


ALL_POSITIONS = ("G1", "G2", "G3", "G4", "G5")
VARIANTS = {
    # Table 1
    "baseline": ungated("Y"),
    "G1 elementwise": gated("Y * sigmoid(X W_h)", "G1"),
    "G2 elementwise": gated("V * sigmoid(X W_h)", "G2"),
    "G3 elementwise": gated("K * sigmoid(X W_h)", "G3"),
    "G4 elementwise": gated("Q * sigmoid(X W_h)", "G4"),
    "G5": gated("O * sigmoid(X W)", "G5"),
    "G1 headwise": gated("Y * sigmoid(X w_h)", "G1", granularity="headwise"),
    "G2 headwise": gated("V * sigmoid(X w_h)", "G2", granularity="headwise"),
    "G1 elementwise, head-shared": gated("Y * sigmoid(X W)", "G1", head_shared=True),
    "G2 elementwise, head-shared": gated("V * sigmoid(X W)", "G2", head_shared=True),
    "G1 additive, SiLU": gated("Y + SiLU(X W_h)", "G1", form="additive", activation="silu"),
    "G1 SiLU": gated("Y * SiLU(X W_h)", "G1", activation="silu"),
    # Table 3
    "RMSNorm of each head": ungated("RMSNorm(Y)", use_attention_output_norm=True),
    "SiLU alone": ungated("SiLU(Y)", attention_output_activation="silu"),
    "G1 additive, identity": gated("Y + X W_h", "G1", form="additive", activation="linear"),
    # Table 4
    "G1 input-independent": gated("Y * sigmoid(w_h)", "G1", input_independent=True, init=0.5),
    "G1 NS-sigmoid": gated("Y * (1 + sigmoid(X W_h)) / 2", "G1", activation="ns_sigmoid"),
    # beyond the tables
    "G3 headwise": gated("K * sigmoid(X w_h)", "G3", granularity="headwise"),
    "G4 headwise": gated("Q * sigmoid(X w_h)", "G4", granularity="headwise"),
    "G1 headwise, score-aware": gated("Y * sigmoid(X w_h + LSE)", "G1", granularity="headwise", logit_lse_weight=1.0),
    "G1 one gate per layer": gated("Y * sigmoid(X w)", "G1", granularity="headwise", head_shared=True),
    "G1 tanh": gated("Y * tanh(X W_h)", "G1", activation="tanh"),
    "G1 ReLU": gated("Y * ReLU(X W_h)", "G1", activation="relu"),
    "G1 and G2": gated("both", "G1", "G2"),
    "G1 to G5": gated("all five", *ALL_POSITIONS),
    # the block around attention
    "QK-norm": ungated("RMSNorm(Q), RMSNorm(K)", use_qk_norm=True),
    "sandwich norm": ungated("x + RMSNorm(F(RMSNorm(x)))", use_sandwich_norm=True),
    "G1 headwise, both norms": gated(
        "all three", "G1", granularity="headwise", use_qk_norm=True, use_sandwich_norm=True
    ),
    "plain MLP": ungated("SiLU(x U) D", use_glu=False),
    "GLU": ungated("(sigmoid(x G) * x U) D", hidden_act="sigmoid"),
    "GeGLU": ungated("(GELU(x G) * x U) D", hidden_act="gelu"),
    "ReGLU": ungated("(ReLU(x G) * x U) D", hidden_act="relu"),
    "SwiGLU, the baseline's": ungated("(SiLU(x G) * x U) D", hidden_act="silu"),
}


def equal_parameters(config: GatedLlamaConfig) -> dict[str, Variant]:
    """
    Return variants with other sizes: baselines of the paper's Table 1 with more heads, and a gated model whose narrower
    MLP makes room for the gates.

    Args:
        config: config of the baseline. Variants with more heads are left out if the heads do not divide.
    """
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    models = {}
    if heads % (2 * key_value_heads) == 0:
        models["twice the kv heads"] = ungated("Y", num_key_value_heads=2 * key_value_heads)
    if heads % 2 == 0 and heads * 3 // 2 % key_value_heads == 0:
        models["1.5 times the query heads"] = ungated("Y", num_attention_heads=heads * 3 // 2)
    of_gates = (config.hidden_size + 1) * heads * config.head_dim
    narrower = config.intermediate_size - round(of_gates / (3 * config.hidden_size))
    if narrower > 0:
        formula = f"Y * sigmoid(X W_h), MLP of {narrower}"
        models["G1 elementwise, narrower MLP"] = Variant(
            formula, VARIANTS["G1 elementwise"].fields | {"intermediate_size": narrower}
        )
    return models


def parameters(config: GatedLlamaConfig) -> int:
    with torch.device("meta"):
        return GatedLlamaForCausalLM(config).num_parameters()


def forward_flops(config: GatedLlamaConfig, sequence_length: int) -> int:
    """Return the floating-point operations of all matmuls in a sequence's forward pass, masked scores included."""
    with torch.device("meta"):
        model = GatedLlamaForCausalLM._from_config(config, attn_implementation="eager")
        tokens = torch.zeros(1, sequence_length, dtype=torch.long)
        mask = torch.zeros(1, 1, sequence_length, sequence_length)  # explicit, because creating a mask reads values
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, attention_mask=mask, use_cache=False)
    return counter.get_total_flops()


class Training:
    """Training of a new model with AdamW on random tokens."""

    def __init__(self, config: GatedLlamaConfig, batch: tuple[int, int], device: torch.device) -> None:
        self.device = device
        self.model = GatedLlamaForCausalLM(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tokens = torch.randint(config.vocab_size, batch).to(device)

    def step(self) -> float:
        """Run forward, backward and the optimizer step; return the seconds."""
        started = time.perf_counter()
        self.model(self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def compare_steps(
    config: GatedLlamaConfig, baseline: GatedLlamaConfig, batch: tuple[int, int], device: torch.device, steps: int
) -> tuple[float, float]:
    """Return the median seconds of a step, and the median ratio to the baseline's steps, which take turns."""
    both = Training(config, batch, device), Training(baseline, batch, device)
    for training in both:
        training.step()  # the first step is slower
    pairs = [(both[0].step(), both[1].step()) for _ in range(steps)]
    return statistics.median(variant_seconds for variant_seconds, _ in pairs), statistics.median(
        variant_seconds / baseline_seconds for variant_seconds, baseline_seconds in pairs
    )


def step_memory(config: GatedLlamaConfig, batch: tuple[int, int], device: torch.device) -> int:
    """Return the peak bytes of building a model and two steps, on a CPU without the bytes of the process before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    training = Training(config, batch, device)
    training.step()
    training.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def send(connection: Connection, function: Callable[..., Any], *args: Any) -> None:
    connection.send(function(*args))


def in_a_process_of_its_own(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a function in a new process, which is forked from a process with imports only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_gated.modeling_gated_llama", "variants"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(sender, function, *args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        sys.exit("error: a training step failed; see above")
    finally:
        process.join()


def main(
    hidden_size: Annotated[int, typer.Option(help="Width of hidden states.")] = 512,
    num_hidden_layers: Annotated[int, typer.Option(help="Number of layers.")] = 2,
    num_attention_heads: Annotated[int, typer.Option(help="Number of query heads.")] = 8,
    num_key_value_heads: Annotated[int, typer.Option(help="Number of key-value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    intermediate_size: Annotated[int, typer.Option(help="Width of the MLP.")] = 1536,
    vocab_size: Annotated[int, typer.Option(help="Number of embeddings.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per training step.")] = 1,
    sequence_length: Annotated[int, typer.Option(min=2, help="Length of a sequence in tokens.")] = 256,
    steps: Annotated[int, typer.Option(min=0, help="Measured training steps; 0 skips training.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or a CUDA device.")] = "cpu",
) -> None:
    """Print a table of the variants at a shape."""
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        sys.exit(f"error: --device must be cpu, cuda or cuda:N, got {device}")
    if device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"error: --device must be available, got {device}, but torch finds no CUDA device; use --device cpu")
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": sequence_length,
    }
    try:
        baseline = GatedLlamaConfig(**sizes, gate_position=[])
    except StrictDataclassError as error:
        sys.exit(f"error: {error.__cause__ or error}")
    variants = VARIANTS | equal_parameters(baseline)
    configs = {name: GatedLlamaConfig(**sizes | variant.fields) for name, variant in variants.items()}
    trained: dict[str, list[str]] = {}
    if steps > 0:
        on = (batch_size, sequence_length), torch.device(device)
        of_baseline = in_a_process_of_its_own(step_memory, baseline, *on)
        for name, config in (progress := tqdm(configs.items(), unit="variant", leave=False)):
            progress.set_description(name)
            seconds, ratio = in_a_process_of_its_own(compare_steps, config, baseline, *on, steps)
            memory = in_a_process_of_its_own(step_memory, config, *on) / of_baseline
            trained[name] = [f"{seconds:.3f}", f"{ratio:.2f}", f"{memory:.2f}"]

    table = Table(box=box.MARKDOWN)
    table.add_column("variant", no_wrap=True)
    table.add_column("formula", no_wrap=True)
    for column in ("parameters added", "FLOPs", *(("step, s", "step time", "step memory") if trained else ())):
        table.add_column(column, justify="right", no_wrap=True)
    parameters_of_baseline, flops_of_baseline = parameters(baseline), forward_flops(baseline, sequence_length)
    for name, variant in variants.items():
        added = parameters(configs[name]) - parameters_of_baseline
        flops = forward_flops(configs[name], sequence_length) / flops_of_baseline
        row = [name, variant.formula, f"{added:+,}" if added else "0", f"{flops:.4f}"]
        table.add_row(*row, *trained.get(name, []))
    console = Console(width=200)
    console.print(table)
    print(
        f"baseline: {parameters_of_baseline:,} parameters, {flops_of_baseline / 1e9:,.1f} GFLOPs for {sequence_length} "
        "tokens; FLOPs, time and memory are ratios to the baseline"
    )


if __name__ == "__main__":
    typer.run(main)

"""Models with shared weights, measured passes, and limits of their cost, for gates.py."""

import ctypes
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from examples.benchmarks.gate_formulations import PEERS
from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.kv_cache import cache_argument


OURS = ("headwise", "elementwise")
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Qwen3-1.7B": {  # without its QK-norm
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def llama_config(shape: str, layers: int, tokens: int) -> LlamaConfig:
    """Return the config of a shape with this number of layers and positions."""
    return LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": layers, "max_position_embeddings": tokens})


def count_parameters(config: LlamaConfig) -> int:
    """Return the number of parameters of a config."""
    with init_empty_weights():
        return sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())


@torch.no_grad()
def ungated_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a Llama model with random weights, in evaluation mode."""
    with torch.device(device):
        model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model.eval()


@torch.no_grad()
def gated_model(name: str, ungated: PreTrainedModel) -> PreTrainedModel:
    """Return a formulation's model with random gates. It shares the parameters of the ungated model."""
    config: Any = ungated.config
    with init_empty_weights():
        model: PreTrainedModel
        if name in OURS:
            model = GatedLlamaForCausalLM(GatedLlamaConfig.from_source_config(config, gate_granularity=name))
        else:
            model = LlamaForCausalLM(config)
            for number, layer in enumerate(model.model.layers):
                layer.self_attn = PEERS[name](config, number)
    of_ungated = dict(ungated.named_parameters())
    for path, parameter in list(model.named_parameters()):
        module, _, attribute = path.rpartition(".")
        weight = of_ungated.get(path)
        if weight is None or weight.shape != parameter.shape:
            weight = nn.Parameter(
                torch.empty_like(parameter, device=ungated.device, dtype=ungated.dtype).normal_(std=0.02)
            )
        setattr(model.get_submodule(module), attribute, weight)
    model.tie_weights()
    return model.to(ungated.device).eval()


class Workload(ABC):
    """
    Repeated pass over a model.

    A round of the benchmark has `passes` passes in either order. After `rounds` rounds a new workload replaces this
    workload, because its place in memory affects the time.

    Args:
        model: model to measure.
        batch_size: number of sequences.
        tokens: length of a sequence in tokens.
        compiled: compile the model with torch.compile and fullgraph, on a CUDA device in `mode`.
    """

    name: str
    mode: str | None = None
    passes = 1
    rounds = 5

    def __init__(self, model: PreTrainedModel, batch_size: int, tokens: int, compiled: bool) -> None:
        self.model, self.compiled = model, compiled
        mode = self.mode if model.device.type == "cuda" else None
        self.call: Callable[..., Any] = torch.compile(model, fullgraph=True, mode=mode) if compiled else model
        vocab_size: int = model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocab_size, (batch_size, tokens), generator=generator).to(model.device)

    @abstractmethod
    def run(self) -> None:
        """Run a pass."""

    def before(self) -> None:  # noqa: B027  # optional
        """Prepare a pass, outside the measurement."""

    def seconds(self) -> float:
        """Return the seconds of a pass."""
        self.before()
        synchronize(self.model.device)
        started = time.perf_counter()
        self.run()
        synchronize(self.model.device)
        return time.perf_counter() - started

    def memory(self) -> int:
        """Return the peak bytes that a pass adds to the memory before; 0, unknown, on a CPU without Linux."""
        self.before()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            self.run()
            return torch.cuda.max_memory_allocated() - held
        if not sys.platform.startswith("linux"):
            return 0
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current size
        held = _resident("VmRSS")
        self.run()
        return _resident("VmHWM") - held


class Prefill(Workload):
    """First pass over a prompt, with logits of the last token. It fills a cache unless compiled."""

    name = "prefill"

    @torch.no_grad()
    def run(self) -> None:
        self.call(self.tokens, use_cache=not self.compiled, logits_to_keep=1)


class Decode(Workload):
    """Pass of one token after a prompt."""

    name = "decode"
    mode = "reduce-overhead"  # CUDA graphs, as when Transformers' generate compiles
    passes = 16
    rounds = 3

    def __init__(self, model: PreTrainedModel, batch_size: int, tokens: int, compiled: bool) -> None:
        super().__init__(model, batch_size, tokens, compiled)
        with torch.no_grad():
            self.cache = StaticCache(config=model.config, max_cache_len=tokens + 1)
            self.cached = {cache_argument(model.forward): self.cache, "use_cache": True}
            model(self.tokens, **self.cached, logits_to_keep=1)
        self.position = torch.full((1, 1), tokens, device=model.device)
        self.filled = [layer.cumulative_length.clone() for layer in self.cache.layers]

    def before(self) -> None:
        if self.compiled and self.model.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        for layer, length in zip(self.cache.layers, self.filled, strict=True):
            layer.cumulative_length.copy_(length)

    def memory(self) -> int:
        """Return the peak bytes; 0, unknown, for CUDA graphs, which have a private memory pool."""
        return 0 if self.compiled and self.model.device.type == "cuda" else super().memory()

    @torch.no_grad()
    def run(self) -> None:
        self.call(self.tokens[:, :1], position_ids=self.position, **self.cached)


class Training(Workload):
    """Forward, backward and a step of AdamW with learning rate 0, so that weights stay unchanged."""

    name = "training"
    rounds = 3

    def __init__(self, model: PreTrainedModel, batch_size: int, tokens: int, compiled: bool) -> None:
        super().__init__(model, batch_size, tokens, compiled)
        model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def run(self) -> None:
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def memory(self) -> int:
        """Return the peak bytes; on a CPU, whose peaks are noisy, the bytes kept for the backward pass."""
        if self.model.device.type == "cuda":
            return super().memory()
        with kept_for_backward(self.model.parameters()) as kept:
            loss = self._loss()  # keeps the tensors alive, so that no address is used twice
        assert loss.requires_grad
        return sum(kept.values())

    def _loss(self) -> torch.Tensor:
        return self.call(self.tokens, labels=self.tokens, use_cache=False).loss


WORKLOADS: dict[str, type[Workload]] = {workload.name: workload for workload in (Prefill, Decode, Training)}


def limit(model: PreTrainedModel, ungated: PreTrainedModel, workload: str, batch_size: int, tokens: int) -> float:
    """
    Return the ratio of a pass's minimum cost to the ungated model's.

    The minimum cost is a single read of weights and cache in decoding, otherwise the matmul operations. Backward costs
    twice as much as forward, so the ratio of training equals the ratio of forward.
    """
    config: Any = ungated.config
    gates = model.num_parameters() - ungated.num_parameters()
    embeddings = 0 if config.tie_word_embeddings else ungated.get_input_embeddings().weight.numel()
    weights = ungated.num_parameters() - embeddings
    if workload == "decode":
        cache = 2 * batch_size * tokens * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return 1 + gates / (weights + cache)
    head = config.vocab_size * config.hidden_size
    matmuls = weights - head + (head if workload == "training" else head / tokens)
    # Two matmuls, halved by the causal mask.
    scores = config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    return 1 + gates / (matmuls + scores)


@contextmanager
def kept_for_backward(tensors: Iterable[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Yield a dict of bytes by address that operations keep for backward inside the context, without `tensors`."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation that keeps its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident(field: str) -> int:
    """Return a field of the process's memory status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

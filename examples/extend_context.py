"""
The paper's recipe for a longer context (arXiv 2505.06708, Table 5), from a checkpoint to a table of losses.

    python examples/extend_context.py [--config examples/extend_context_small.toml] [--output build/extend_context]

    # several GPUs; the configuration's comments say what it needs
    accelerate launch --config_file examples/accelerate_fsdp2.yaml examples/extend_context.py \
        --config examples/extend_context_full.toml --output build/extend_context_full

1. The base of RoPE is raised, and training goes on at the longer length: OUTPUT/trained. (A model from scratch is
   first trained at the short length, with the base as it was: OUTPUT/short.)
2. YaRN extends the context further, without training: OUTPUT/yarn.
3. The loss on held-out text, by the number of tokens before, of the model before, with the base raised and no training,
   trained, and with YaRN: a table, OUTPUT/results.json and OUTPUT/loss_by_position.png.

Started again with the same output, it goes on where it was: from the last state that was saved (OUTPUT/state), with the
batch that would have come next. Settings are explained in examples/extend_context_settings.py. The plot needs
matplotlib: pip install '.[plot]'.

Logits are held one chunk at a time. Attention is sdpa's, without a mask; of a source with sliding windows (Mistral) it
has one of [length, length] bits.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from extend_context_settings import FromScratch, Settings, SettingsError, read_settings, starting_config
from loss_report import RESULTS, print_table, write_report
from packed_text import PackedText, train_tokenizer, write_tokens
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.configuration import extend_context
from modeling_gated.evaluation import loss_by_position


@dataclass(frozen=True)
class Run:
    """What every stage needs."""

    settings: Settings
    output: Path
    accelerator: Accelerator
    text: PackedText

    @property
    def start(self) -> Path:
        """The checkpoint whose context is extended."""
        return Path(self.settings.model) if self.settings.model else self.output / "short"


@dataclass(frozen=True)
class Stage:
    """Training that ends with a checkpoint in OUTPUT/name; length, steps, batches and learning rate are the plan's."""

    name: str
    plan: Settings | FromScratch


class WindowLoss(nn.Module):
    """
    A causal language model's mean loss on windows of text, with the logits of one chunk of tokens in memory. They are
    those of the output embeddings: what some families do with them then (Gemma 2, Cohere, Granite) is left out.

    Not torch's linear_cross_entropy: it needs torch 2.13, computes in float32 under autocast, and returns a bfloat16
    loss for bfloat16 weights. This module is what is sharded or replicated, so all that uses parameters happens in its
    forward; that of `lm_head` is checkpointed, since backward would else need every chunk's logits.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.chunk_size = chunk_size
        self._no_split_modules = model._no_split_modules  # FSDP's units

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """
        Args:
            windows: token ids [batch, length + 1]; the labels are the inputs shifted by one.
        """
        hidden = self.model.base_model(windows[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        labels = windows[:, 1:].flatten()
        chunks = zip(hidden.split(self.chunk_size), labels.split(self.chunk_size), strict=True)
        losses = [checkpoint(self._summed_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / len(labels)

    def _summed_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum"
        )


def train(run: Run, model: PreTrainedModel, stage: Stage) -> None:
    """Train from the stage's last saved state, if there is one, and save the model as OUTPUT/name."""
    accelerator, settings, plan = run.accelerator, run.settings, stage.plan
    # Transformers renamed it after 5.16.
    checkpoint_layers = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    checkpoint_layers({"use_reentrant": False})
    model.train()
    module = WindowLoss(model)
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    module, optimizer = accelerator.prepare(module, optimizer)
    start = load_state(run, stage)
    with tqdm(
        desc=f"training {stage.name}",
        total=plan.steps,
        initial=start,
        unit="step",
        disable=not accelerator.is_main_process,
    ) as progress:
        for step in range(start, plan.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, settings.warmup_steps, step)
            loss = train_step(run, module, optimizer, stage, step)
            tokens = plan.length * plan.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
            speed = tokens / (time.perf_counter() - began)
            progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            progress.update()
            if (step + 1) % settings.save_every == 0:
                save_state(run, stage, step + 1)
    save_model(run, module, stage.name)
    accelerator.free_memory(module, optimizer)


def train_step(run: Run, module: nn.Module, optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> float:
    """One step of the optimizer; the mean loss of its batches, over all processes."""
    accelerator, accumulated, plan = run.accelerator, run.settings.gradient_accumulation_steps, stage.plan
    losses = []
    for batch in range(step * accumulated, (step + 1) * accumulated):
        first = (batch * accelerator.num_processes + accelerator.process_index) * plan.batch_size
        windows = run.text.training_batch(plan.length, first, plan.batch_size, run.settings.seed)
        with accelerator.accumulate(module):
            loss = module(windows.to(accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().float())
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


def learning_rate(plan: Settings | FromScratch, warmup_steps: int, step: int) -> float:
    """Linear warmup, then a cosine down to a tenth. A function of the step, so that it needs no state."""
    if step < warmup_steps:
        return plan.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, plan.steps - warmup_steps)
    return plan.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def save_state(run: Run, stage: Stage, step: int) -> None:
    """Save weights, optimizer and random states as OUTPUT/state/NAME-STEP; those from before go when it is there."""
    folder = run.output / "state"
    partial = folder / "partial"
    if run.accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(exist_ok=True)
    run.accelerator.wait_for_everyone()
    run.accelerator.save_state(str(partial), safe_serialization=False)  # which would part with tied weights
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        before = list(folder.glob("*-*"))
        partial.rename(folder / f"{stage.name}-{step}")
        for path in before:
            shutil.rmtree(path)
    run.accelerator.wait_for_everyone()


def load_state(run: Run, stage: Stage) -> int:
    """Load the last state that was saved in a stage, and say how many steps it had taken."""
    saved = (re.fullmatch(rf"{stage.name}-(\d+)", path.name) for path in (run.output / "state").glob("*"))
    step = max((int(match[1]) for match in saved if match), default=0)
    if step > 0:
        run.accelerator.load_state(str(run.output / "state" / f"{stage.name}-{step}"))
    return step


def save_model(run: Run, module: nn.Module, name: str) -> None:
    """Save what has been trained as OUTPUT/name, where it appears when it is complete."""
    weights = run.accelerator.get_state_dict(module)  # gathered from all processes
    if run.accelerator.is_main_process:
        model = run.accelerator.unwrap_model(module).model
        # Gathered tied weights are copies of each other, and saved would both be: the first name is enough.
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
        names = {key: key.removeprefix("model.") for key in weights}
        write_checkpoint(run, model, name, {new: weights[key] for key, new in names.items() if new not in tied})
        shutil.rmtree(run.output / "state", ignore_errors=True)
    run.accelerator.wait_for_everyone()


def write_checkpoint(
    run: Run, model: PreTrainedModel, name: str, weights: dict[str, torch.Tensor] | None = None
) -> None:
    partial = run.output / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    AutoTokenizer.from_pretrained(tokenizer_folder(run.settings, run.output)).save_pretrained(partial)
    partial.rename(run.output / name)


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def extend(run: Run) -> None:
    """The recipe's stages, but for those whose checkpoint is there."""
    settings, scratch = run.settings, run.settings.from_scratch
    if scratch is not None and not run.start.is_dir():
        set_seed(settings.seed)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(settings, run.output))
        config = starting_config(settings)
        config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
        train(run, GatedLlamaForCausalLM(config), Stage("short", scratch))
    if not (run.output / "trained").is_dir():
        model = load(run.start)
        extend_context(model, settings.length, "rope_base", settings.rope_theta)
        train(run, model, Stage("trained", settings))
    if run.accelerator.is_main_process and not (run.output / "yarn").is_dir():
        model = load(run.output / "trained")
        extend_context(model, settings.yarn_length, "yarn")
        write_checkpoint(run, model, "yarn")
    run.accelerator.wait_for_everyone()


def compared_models(run: Run) -> Iterator[tuple[str, PreTrainedModel]]:
    """Each stage's model, one in memory at a time."""
    dtype = torch.bfloat16 if run.settings.mixed_precision == "bf16" else torch.float32
    yield "before", load(run.start, dtype)
    model = load(run.start, dtype)
    extend_context(model, run.settings.length, "rope_base", run.settings.rope_theta)
    yield "base raised", model
    yield "trained", load(run.output / "trained", dtype)
    yield "YaRN", load(run.output / "yarn", dtype)


def evaluate(run: Run) -> dict[str, torch.Tensor]:
    """The loss of each model at each position, [yarn_length], the mean over windows that the processes share out."""
    accelerator = run.accelerator
    windows = run.text.held_out_windows(run.settings.yarn_length, run.settings.evaluation_windows)
    found = {}
    for name, model in compared_models(run):
        model.to(accelerator.device).eval()
        own = windows[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros(run.settings.yarn_length)
        with tqdm(
            desc=f"evaluating {name}", total=own[:, 1:].numel(), unit=" tokens", disable=not accelerator.is_main_process
        ) as progress:
            for window in own:
                total += loss_by_position(model, window, advance=progress.update)
        found[name] = accelerator.reduce(total.to(accelerator.device), "sum").cpu() / len(windows)
    return found


def tokenizer_folder(settings: Settings, output: Path) -> Path:
    return Path(settings.tokenizer or settings.model or output / "tokenizer")


def check_output(settings: Settings, output: Path, processes: int) -> None:
    """Make the output's folder, or see that it was made with the same settings."""
    output.mkdir(parents=True, exist_ok=True)
    path, now = output / "settings.json", asdict(settings) | {"processes": processes}
    if not path.is_file():
        if any(output.iterdir()):
            raise SettingsError(f"{output}: is neither empty nor an output of this script")
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in now.items():
        if before.get(name) != value:
            raise SettingsError(f"{output}: was made with {name}={before.get(name)!r}, not {value!r}")


def prepare_text(settings: Settings, output: Path) -> PackedText:
    """The text's tokens, and a tokenizer where none is given; made once."""
    folder = tokenizer_folder(settings, output)
    if settings.from_scratch is not None and folder == output / "tokenizer" and not folder.is_dir():
        partial = output / "tokenizer.partial"
        train_tokenizer(settings.text, settings.from_scratch.vocabulary_size).save_pretrained(partial)
        partial.rename(folder)
    path = output / "tokens.bin"
    if not path.is_file():
        write_tokens(settings.text, AutoTokenizer.from_pretrained(folder), path)
    text = PackedText(path)
    if text.training_windows(settings.length) < 1:
        raise SettingsError(f"length={settings.length}: the text has only {text.training_size:,} tokens to train on")
    if text.held_out_size <= settings.yarn_length:
        raise SettingsError(f"yarn_length={settings.yarn_length}: only {text.held_out_size:,} tokens are held out")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("extend_context_small.toml"))
    parser.add_argument("--output", type=Path, default=Path("build/extend_context"))
    parsed = parser.parse_args(arguments)
    disable_progress_bar()  # of Transformers, beside those here
    try:
        settings = read_settings(parsed.config)
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],  # the others wait for the tokens
        )
        with accelerator.main_process_first():
            check_output(settings, parsed.output, accelerator.num_processes)
            text = prepare_text(settings, parsed.output)
    except (OSError, ValueError) as error:  # SettingsError, and what texts and tokenizers are refused with
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)
    if accelerator.is_fsdp2 and settings.mixed_precision == "bf16":
        # Accelerate's policy would round the loss, and sums of gradients, to bfloat16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    run = Run(settings, parsed.output, accelerator, text)
    extend(run)
    if not (run.output / RESULTS).is_file():
        losses = evaluate(run)
        if accelerator.is_main_process:
            short = starting_config(settings).max_position_embeddings
            write_report(
                losses, {"before": short, "trained": settings.length, "YaRN": settings.yarn_length}, run.output
            )
    if accelerator.is_main_process:
        print_table(run.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()

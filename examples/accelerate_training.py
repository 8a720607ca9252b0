"""
A training with accelerate, on one process or many, that goes on where it was: packed text in, a checkpoint out.

What is trained is a module whose forward takes windows of tokens and gives their mean loss; it is what accelerate
shards or replicates. Started again with the same output, training goes on from the last state that was saved
(OUTPUT/state), with the batch that would have come next.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from packed_text import PackedText
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from modeling_gated.training import keep_float32_states
from modeling_gated.training.chunks import at_least_float32, sum_over_chunks


class Plan(Protocol):
    """Lengths are in tokens, and a batch is of one process and forward pass."""

    length: int
    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Run:
    """What every training of an output needs."""

    output: Path
    accelerator: Accelerator
    text: PackedText
    tokenizer: Path  # a folder; its files go into every checkpoint
    warmup_steps: int
    gradient_accumulation_steps: int
    save_every: int
    seed: int


@dataclass(frozen=True)
class Stage:
    """Training that ends with a checkpoint in OUTPUT/name; length, steps, batches and learning rate are the plan's."""

    name: str
    plan: Plan


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
        return sum_over_chunks(self._summed_loss, hidden, labels, chunk_size=self.chunk_size) / len(labels)

    def _summed_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return functional.cross_entropy(at_least_float32(logits), labels, reduction="sum")


def make_accelerator(mixed_precision: str, gradient_accumulation_steps: int) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],  # the others wait for the tokens
    )
    if accelerator.is_fsdp2 and mixed_precision == "bf16":
        # Accelerate's policy would round the loss, and sums of gradients, to bfloat16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def load(path: str | Path, dtype: torch.dtype | str = torch.float32, **options: Any) -> PreTrainedModel:
    """A causal language model, whole in this process; accelerate shards what it prepares."""
    unset_hf_deepspeed_config()  # with which Transformers would shard it over all processes, by ZeRO-3
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let the model keep nothing of its layers for the backward pass but their inputs."""
    # Transformers renamed it after 5.16.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def train(
    run: Run, module: nn.Module, groups: Iterable[dict[str, Any]], stage: Stage, float32_states: bool = False
) -> nn.Module:
    """
    Train from the stage's last saved state, if there is one. Its losses are in OUTPUT/name.losses, one a line.

    Args:
        module: takes windows [batch, length + 1] and gives their mean loss.
        groups: of parameters, for AdamW. Their `lr`, if they have any, is in proportion to the plan's.
        float32_states: whether AdamW is to keep float32 copies of weights that aren't.

    Returns:
        The module as accelerate has prepared it.
    """
    accelerator, plan = run.accelerator, stage.plan
    module.train()
    optimizer = torch.optim.AdamW(groups, plan.learning_rate, betas=(0.9, 0.95))
    if float32_states:
        keep_float32_states(optimizer)
    shares = [group["lr"] / plan.learning_rate for group in optimizer.param_groups]
    if accelerator.is_fsdp2:  # which else looks for the layers of the model before
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = module._no_split_modules
    if accelerator.state.deepspeed_plugin is not None:  # which else asks a data loader
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = plan.batch_size
        config["gradient_accumulation_steps"] = run.gradient_accumulation_steps
    module, optimizer = accelerator.prepare(module, optimizer)
    start = load_state(run, stage)
    losses = read_losses(run.output, stage.name)[:start]
    with tqdm(
        desc=f"training {stage.name}",
        total=plan.steps,
        initial=start,
        unit="step",
        disable=not accelerator.is_main_process,
    ) as progress:
        for step in range(start, plan.steps):
            began = time.perf_counter()
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = share * learning_rate(plan, run.warmup_steps, step)
            loss = train_step(run, module, optimizer, stage, step)
            losses.append(loss)
            tokens = plan.length * plan.batch_size * run.gradient_accumulation_steps * accelerator.num_processes
            speed = tokens / (time.perf_counter() - began)
            progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            progress.update()
            if (step + 1) % run.save_every == 0:
                write_losses(run, stage, losses)
                save_state(run, stage, step + 1)
    write_losses(run, stage, losses)
    return module


def write_losses(run: Run, stage: Stage, losses: list[float]) -> None:
    if run.accelerator.is_main_process:
        partial = run.output / f"{stage.name}.losses.partial"
        partial.write_text("".join(f"{loss}\n" for loss in losses), encoding="utf-8")
        partial.rename(partial.with_suffix(""))


def read_losses(output: Path, name: str) -> list[float]:
    """The training loss of each step that is recorded of a stage."""
    path = output / f"{name}.losses"
    return [float(line) for line in path.read_text(encoding="utf-8").split()] if path.is_file() else []


def train_step(run: Run, module: nn.Module, optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> float:
    """One step of the optimizer; the mean loss of its batches, over all processes."""
    accelerator, accumulated, plan = run.accelerator, run.gradient_accumulation_steps, stage.plan
    losses = []
    for batch in range(step * accumulated, (step + 1) * accumulated):
        first = (batch * accelerator.num_processes + accelerator.process_index) * plan.batch_size
        windows = run.text.training_batch(plan.length, first, plan.batch_size, run.seed)
        with accelerator.accumulate(module):
            loss = module(windows.to(accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().float())
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


def learning_rate(plan: Plan, warmup_steps: int, step: int) -> float:
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


def save_model(run: Run, module: nn.Module, name: str, attribute: str = "model") -> None:
    """Save the module's model as OUTPUT/name, where it appears when it is complete."""
    weights = run.accelerator.get_state_dict(module)  # gathered from all processes
    if run.accelerator.is_main_process:
        model = getattr(run.accelerator.unwrap_model(module), attribute)
        # Gathered tied weights are copies of each other, and saved would both be: the first name is enough.
        names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
        prefixed = {key: key.removeprefix(f"{attribute}.") for key in weights if key.startswith(f"{attribute}.")}
        own = {new: weights[key] for key, new in prefixed.items() if new in names}
        write_checkpoint(run, model, name, own)
        shutil.rmtree(run.output / "state", ignore_errors=True)
    run.accelerator.wait_for_everyone()


def write_checkpoint(
    run: Run, model: PreTrainedModel, name: str, weights: dict[str, torch.Tensor] | None = None
) -> None:
    partial = run.output / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    AutoTokenizer.from_pretrained(run.tokenizer).save_pretrained(partial)
    partial.rename(run.output / name)


def check_output(settings: dict[str, Any], output: Path) -> None:
    """
    Make the output's folder, or see that it was made with the same settings.

    Raises:
        ValueError: if it was not.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, now = output / "settings.json", json.loads(json.dumps(settings))
    if not path.is_file():
        if {found.name for found in output.iterdir()} - {"settings.partial"}:
            raise ValueError(f"{output}: is neither empty nor an output of this script")
        partial = output / "settings.partial"
        partial.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        partial.rename(path)
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(f"{output}: was made with {name}={before.get(name)!r}, not {value!r}")

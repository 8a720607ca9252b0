"""
Training with accelerate, on one process or many, that goes on where it was.

What is trained is a module whose forward takes windows of tokens and gives their mean loss; it is what accelerate
shards or replicates. Started again with the same output, training goes on from the last state that was saved
(OUTPUT/state), with the batch that would have come next.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

from .float32_states import keep_float32_states


class TrainingText(Protocol):
    """Windows of tokens, in an endless order that a seed determines."""

    def training_batch(self, length: int, first: int, count: int, seed: int) -> torch.Tensor:
        """Return token ids [windows, tokens] of the windows from `first` to `first + count`."""


class Schedule(Protocol):
    """Lengths are in tokens, and a batch is of one process and forward pass."""

    @property
    def length(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...


@dataclass(frozen=True)
class Run:
    """Settings that every training run has."""

    output: Path
    accelerator: Accelerator
    text: TrainingText
    tokenizer: Path  # a folder; its files go into every checkpoint
    warmup_steps: int
    gradient_accumulation_steps: int
    save_every: int
    seed: int
    progress: bool = True


@dataclass(frozen=True)
class Evaluation:
    """
    A loss on held-out text, for every so many steps. Training ends when `patience` of them in a row have not been lower
    than the lowest before.
    """

    loss: Callable[[nn.Module], float]
    every: int
    patience: int


@dataclass(frozen=True)
class Stage:
    """Training of what a checkpoint is made of; length, steps, batches and learning rate are the schedule's."""

    name: str
    schedule: Schedule
    evaluation: Evaluation | None = None


def make_accelerator(mixed_precision: str, gradient_accumulation_steps: int) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        # Else a data loader that another training in this process has left at its end makes a step of every batch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],  # the others wait for the tokens
    )
    if accelerator.is_fsdp2 and mixed_precision == "bf16":
        # Accelerate's policy would round the loss, and sums of gradients, to bfloat16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def train(
    run: Run, module: nn.Module, groups: Iterable[dict[str, Any]], stage: Stage, float32_states: bool = False
) -> nn.Module:
    """
    Train from the stage's last saved state, if there is one. Its losses are in OUTPUT/name.losses, one a line, those on
    held-out text in OUTPUT/name.held_out.

    Args:
        module: takes windows [batch, length + 1] and gives their mean loss.
        groups: of parameters, for AdamW. Their `lr`, if they have any, is in proportion to the schedule's.
        float32_states: whether AdamW is to keep float32 copies of weights that aren't.

    Returns:
        The module as accelerate has prepared it.
    """
    accelerator, schedule = run.accelerator, stage.schedule
    module.train()
    optimizer = torch.optim.AdamW(groups, schedule.learning_rate, betas=(0.9, 0.95))
    if float32_states:
        keep_float32_states(optimizer)
    shares = [group["lr"] / schedule.learning_rate for group in optimizer.param_groups]
    if accelerator.is_fsdp2:  # which else looks for the layers of the model before
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = module._no_split_modules
    if accelerator.state.deepspeed_plugin is not None:  # which else asks a data loader
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = schedule.batch_size
        config["gradient_accumulation_steps"] = run.gradient_accumulation_steps
    module, optimizer = accelerator.prepare(module, optimizer)
    start = load_state(run, stage)
    losses, held_out = read_losses(run.output, stage.name)[:start], []
    if (evaluation := stage.evaluation) is not None:
        held_out = read_losses(run.output, stage.name, "held_out")[: start // evaluation.every]
    with tqdm(
        desc=f"training {stage.name}",
        total=schedule.steps,
        initial=start,
        unit="step",
        disable=None if run.progress and accelerator.is_main_process else True,
    ) as progress:
        # A run may have ended early, and been stopped right after.
        ended = evaluation is not None and has_ended(held_out, evaluation.patience)
        for step in range(start, start if ended else schedule.steps):
            began = time.perf_counter()
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = share * learning_rate(schedule, run.warmup_steps, step)
            loss, tokens = train_step(run, module, optimizer, stage, step)
            losses.append(loss)
            speed = tokens / (time.perf_counter() - began)
            progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            progress.update()
            if evaluation is not None and (step + 1) % evaluation.every == 0:
                held_out.append(evaluation.loss(module))
                module.train()
            if (step + 1) % run.save_every == 0:
                write_losses(run, stage, losses, held_out)
                save_state(run, stage, step + 1)
            if evaluation is not None and has_ended(held_out, evaluation.patience):
                break
    write_losses(run, stage, losses, held_out)
    return module


def has_ended(losses: Sequence[float], patience: int) -> bool:
    """Return whether the last `patience` losses are no lower than the lowest before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def write_losses(run: Run, stage: Stage, losses: list[float], held_out: list[float]) -> None:
    if run.accelerator.is_main_process:
        for kind, numbers in (("losses", losses), ("held_out", held_out)):
            if numbers or kind == "losses":
                partial = run.output / f"{stage.name}.{kind}.partial"
                partial.write_text("".join(f"{number}\n" for number in numbers), encoding="utf-8")
                partial.rename(partial.with_suffix(""))


def read_losses(output: Path, name: str, kind: str = "losses") -> list[float]:
    """Return the recorded losses of a stage: the training loss of each step, or the losses on `held_out` text."""
    path = output / f"{name}.{kind}"
    return [float(line) for line in path.read_text(encoding="utf-8").split()] if path.is_file() else []


def train_step(
    run: Run, module: nn.Module, optimizer: torch.optim.Optimizer, stage: Stage, step: int
) -> tuple[float, int]:
    """
    Take one step of the optimizer.

    Return the mean loss of its batches over all processes, and their tokens if each process has as many as this one.
    """
    accelerator, accumulated, schedule = run.accelerator, run.gradient_accumulation_steps, stage.schedule
    losses, tokens = [], 0
    for batch in range(step * accumulated, (step + 1) * accumulated):
        first = (batch * accelerator.num_processes + accelerator.process_index) * schedule.batch_size
        windows = run.text.training_batch(schedule.length, first, schedule.batch_size, run.seed)
        tokens += windows.numel()
        with accelerator.accumulate(module):
            loss = module(windows.to(accelerator.device))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().float())
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
    return loss, tokens * accelerator.num_processes


def learning_rate(schedule: Schedule, warmup_steps: int, step: int) -> float:
    """Return the learning rate of a step: linear warmup, then a cosine down to a tenth. It needs no state."""
    if step < warmup_steps:
        return schedule.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, schedule.steps - warmup_steps)
    return schedule.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


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


def check_run_settings(settings: dict[str, Any], output: Path) -> None:
    """
    Make the output's folder, or see that it was made with the same settings.

    Raises:
        ValueError: if it was not.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, now = output / "settings.json", json.loads(json.dumps(settings))
    if not path.is_file():
        if {file.name for file in output.iterdir()} - {"settings.partial"}:
            raise ValueError(f"{output}: must be empty or the output of such a run; name another directory")
        partial = output / "settings.partial"
        partial.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        partial.rename(path)
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{output}: {name} must be {before.get(name)!r}, as at its start, got {value!r}; name another directory"
            )

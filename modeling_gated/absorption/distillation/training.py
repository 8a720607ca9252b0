"""The training of an edited model on the original's predictions."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_gated.absorption.edit.sinks import SinkDirection
from modeling_gated.absorption.settings import AbsorptionSettings
from modeling_gated.absorption.texts import Text, TrainingWindows
from modeling_gated.errors import AbsorptionError
from modeling_gated.evaluation.windows import spread_windows
from modeling_gated.gate_names import is_gate
from modeling_gated.training import gate_param_groups
from modeling_gated.training.loop import Evaluation, Run, Stage, train

from .loss import SinkDistillation


STAGE = "distillation"
# Of each kind, for the loss that decides when it is enough.
_EVALUATED = 2


def distil(
    original: PreTrainedModel,
    edited: PreTrainedModel,
    directions: Sequence[SinkDirection | None],
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    settings: AbsorptionSettings,
    *,
    bfloat16_matmuls: bool = False,
    progress: bool = False,
) -> None:
    """
    Train an edited model's attention blocks and norms until it predicts what the original does, or the tokens are used
    up. Gates stay 1 in layers without sinks. Where there is a state in the folder, training goes on from it.

    Args:
        original: what it learns from.
        edited: the model, of which all is frozen. It is changed, and frozen again.
        directions: of the original's sinks, as `absorb_sinks` found them.
        texts: what is trained on, in turn, and of which the part for it decides when it is enough.
        tokenizer: both models'.
        folder: for the state of the training and its losses.
        settings: of which those that concern the distillation count.
        bfloat16_matmuls: whether both models multiply in bfloat16, though they are float32, on a CPU.
        progress: show a progress bar.
    """
    _unfreeze(edited, directions, settings.trains_gates)
    module = SinkDistillation(
        edited,
        original,
        directions,
        sink_weight=settings.sink_weight,
        hidden_weight=settings.hidden_weight,
        hidden_limit=settings.hidden_limit,
        bfloat16_matmuls=bfloat16_matmuls,
    )
    has_gates = any(is_gate(name) for name, parameter in edited.named_parameters() if parameter.requires_grad)
    gate_rate = settings.gate_learning_rate if has_gates else None
    groups = gate_param_groups(edited, settings.learning_rate, gate_rate)
    validation = _validation_windows(texts, settings.window_tokens)
    accelerator = accelerator_for(edited.device)

    @torch.no_grad()
    def loss(trained: nn.Module) -> float:
        trained.eval()
        losses = [trained(window.to(accelerator.device)).item() * window.numel() for window in validation]
        return sum(losses) / sum(window.numel() for window in validation)

    stage = Stage(STAGE, settings, Evaluation(loss, settings.evaluate_every, settings.patience))
    run = Run(
        output=folder,
        accelerator=accelerator,
        text=TrainingWindows(texts, tokenizer, settings.long_window_tokens, settings.batches_per_long),
        tokenizer=folder,
        warmup_steps=settings.warmup_steps,
        gradient_accumulation_steps=1,
        save_every=settings.save_every,
        seed=settings.seed,
        progress=progress,
    )
    with torch.random.fork_rng(), _current(edited.device):
        torch.manual_seed(settings.seed)
        train(run, module, groups, stage, float32_states=edited.dtype != torch.float32)
    accelerator.free_memory()
    edited.eval().requires_grad_(False)


def accelerator_for(device: torch.device) -> Accelerator:
    """
    Of this process, and without mixed precision.

    Raises:
        AbsorptionError: if accelerate was told otherwise before, as a Trainer does; it keeps to that.
    """
    try:
        accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    except ValueError as error:
        raise AbsorptionError(
            f"accelerate is set up in another way in this process; begin a new one ({error})"
        ) from None
    if accelerator.device.type != device.type:
        raise AbsorptionError(f"device {device}: accelerate uses {accelerator.device} in this process; begin a new one")
    return accelerator


def _unfreeze(edited: PreTrainedModel, directions: Sequence[SinkDirection | None], trains_gates: bool) -> None:
    decoder: Any = edited.base_model
    for layer, direction in zip(decoder.layers, directions, strict=True):
        for name, parameter in layer.self_attn.named_parameters():
            parameter.requires_grad_(not is_gate(name) or (trains_gates and direction is not None))
    for name, parameter in edited.named_parameters():
        if name.split(".")[-2].endswith("norm"):
            parameter.requires_grad_(True)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Where accelerate trains, which else takes the first GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _validation_windows(texts: Sequence[Text], length: int) -> list[torch.Tensor]:
    """Token ids [1, tokens] each, shorter where a text has fewer than `length`."""
    windows = []
    for text in texts:
        if (most := min(length, len(text.validation))) > 1:
            windows += [window[None] for window in spread_windows(text.validation, most, _EVALUATED)]
    if not windows:
        raise AbsorptionError("no text is long enough to say when training is enough")
    return windows

"""Training of an edited model on the source model's predictions."""

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
# Number of validation windows per text.
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
    Train the attention blocks and norms of an edited model on the source model's predictions.

    Training ends when all tokens are used, or earlier when the validation loss stops falling. Gates of layers without
    sinks stay 1. Training resumes from a state in the folder, if there is one.

    Args:
        original: source model, the teacher.
        edited: edited model, the student, with all parameters frozen. Its weights change; it is frozen afterwards.
        directions: sink direction of each layer, as `absorb_sinks` returns, or None.
        texts: texts to train on in turn. Their validation parts decide when training ends.
        tokenizer: tokenizer of both models.
        folder: folder for states and losses.
        settings: settings of the distillation; other settings are not used.
        bfloat16_matmuls: use bfloat16 matmuls on a CPU although both models are float32.
        progress: show a progress bar.

    Raises:
        AbsorptionError: if no text is long enough for validation, or accelerate uses another device or precision.
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
    Return an Accelerator without mixed precision for a device.

    Raises:
        AbsorptionError: if accelerate was set up with another device or precision in this process, for example by a
            Trainer.
    """
    try:
        accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    except ValueError as error:
        raise AbsorptionError(
            f"accelerate must be unused or set up without mixed precision in this process, got {error}; start a new "
            "process"
        ) from None
    if accelerator.device.type != device.type:
        raise AbsorptionError(
            f"device must be {accelerator.device}, which accelerate uses in this process, got {device}; start a new "
            "process"
        )
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
    """Return a context in which accelerate trains on this device, instead of the first GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _validation_windows(texts: Sequence[Text], length: int) -> list[torch.Tensor]:
    """Return validation windows, token ids [1, tokens] each. Windows of short texts have fewer than `length` tokens."""
    windows = []
    for text in texts:
        if (most := min(length, len(text.validation))) > 1:
            windows += [window[None] for window in spread_windows(text.validation, most, _EVALUATED)]
    if not windows:
        raise AbsorptionError("texts must have at least 2 tokens of validation text, got none; use a longer text")
    return windows

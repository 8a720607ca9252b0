"""Distillation from a model with sinks into one that is not to have any."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_gated.training import Distillation

from .attention import captured_attention
from .sinks import SinkDirection


class SinkDistillation(Distillation):
    """
    The mean over tokens of KL(teacher || student) in nats, plus `sink_weight` times what the student's queries give to
    the teacher's sinks: without that, training makes sinks anew.

    Args:
        student: the edited model.
        teacher: the original.
        directions: of the teacher's sinks, one per layer; None where there are none.
        sink_weight: of the attention to sinks, mean over tokens, heads and layers that have some.
        rows: how many queries of a batch, drawn at random, say what sinks get.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        directions: Sequence[SinkDirection | None],
        *,
        sink_weight: float,
        rows: int = 64,
        share_weights: bool = True,
    ) -> None:
        super().__init__(student, teacher, attention_weight=0.0, share_weights=share_weights)
        self.directions, self.sink_weight, self.rows = directions, sink_weight, rows

    def forward(self, windows: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """
        Args:
            windows: token ids [batch, tokens], without padding.
        """
        divergence, mass = self.terms(windows)
        return divergence + self.sink_weight * mass

    def terms(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL divergence and attention to sinks, each a float32 scalar."""
        rows = torch.randperm(windows.shape[1])[: self.rows].to(windows.device)
        with self._found_sinks() as sinks, captured_attention(self.student.base_model) as captured:
            divergence = super().forward(windows).kl_loss
        assert divergence is not None
        given = [captured[layer].to_sinks(tokens, rows).sum(-1).mean() for layer, tokens in sinks.items()]
        return divergence, torch.stack(given).mean() if given else divergence.new_zeros(())

    @contextmanager
    def _found_sinks(self) -> Iterator[dict[int, torch.Tensor]]:
        """The teacher's sinks in the forward pass made meanwhile: bool [batch, tokens] by layer."""
        found: dict[int, torch.Tensor] = {}
        decoder: Any = self.teacher.base_model
        with ExitStack() as stack:
            for number, (layer, direction) in enumerate(zip(decoder.layers, self.directions, strict=True)):
                if direction is not None:
                    hook = partial(self._find_sinks, found, number, direction)
                    stack.callback(layer.input_layernorm.register_forward_hook(hook).remove)
            yield found

    def _find_sinks(
        self,
        found: dict[int, torch.Tensor],
        layer: int,
        direction: SinkDirection,
        module: nn.Module,
        arguments: tuple[Any, ...],
        output: torch.Tensor,
    ) -> None:
        found[layer] = direction.tokens(output)

"""Loss that distils a model with sinks into a model without sinks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_gated.absorption.bfloat16_matmuls import matmuls_in_bfloat16
from modeling_gated.absorption.edit.attention import captured_attention
from modeling_gated.absorption.edit.sinks import SinkDirection
from modeling_gated.training import Distillation


class SinkDistillation(Distillation):
    """
    Mean over tokens of KL(teacher || student) in nats, plus two penalties on new sinks and massive activations.

    The first penalty is `sink_weight` times the attention of the student's queries to the teacher's sinks. The second
    is `hidden_weight` times the mean over layers of max(|h| / limit - 1, 0)², where |h| is the largest |hidden state|
    after a layer.

    Args:
        student: edited model.
        teacher: source model.
        directions: direction of the teacher's sinks for each layer; None for layers without sinks.
        sink_weight: weight of attention to sinks, mean over tokens, heads and layers with sinks.
        hidden_weight: weight of hidden states above the limit.
        hidden_limit: limit of |hidden state|. The limit of a layer is higher if half of the largest |hidden state| of
            the teacher's other tokens is more, so that models with large hidden states are not penalized.
        rows: number of queries per batch, drawn at random, whose attention to sinks is measured.
        bfloat16_matmuls: use bfloat16 matmuls on a CPU although both models are float32.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        directions: Sequence[SinkDirection | None],
        *,
        sink_weight: float,
        hidden_weight: float,
        hidden_limit: float,
        rows: int = 64,
        bfloat16_matmuls: bool = False,
    ) -> None:
        super().__init__(student, teacher, attention_weight=0.0)
        self.directions, self.sink_weight, self.rows = directions, sink_weight, rows
        self.hidden_weight, self.hidden_limit, self.bfloat16_matmuls = hidden_weight, hidden_limit, bfloat16_matmuls

    def forward(self, windows: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """
        Return the loss, a float32 scalar.

        Args:
            windows: token ids [batch, tokens], without padding.
        """
        divergence, mass, excess = self.terms(windows)
        return divergence + self.sink_weight * mass + self.hidden_weight * excess

    def terms(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return KL divergence, attention to sinks, and excess of hidden states, unweighted float32 scalars."""
        rows = torch.randperm(windows.shape[1])[: self.rows].to(windows.device)
        with (
            self._found_sinks() as sinks,
            captured_attention(self.student.base_model) as captured,
            _layer_outputs(self.student, _largest) as largest_states,
            _layer_outputs(self.teacher, _largest_of_tokens) as expected,
        ):
            divergence = super().forward(windows).kl_loss
        assert divergence is not None
        sink_attention = [captured[layer].to_sinks(tokens, rows).sum(-1).mean() for layer, tokens in sinks.items()]
        mass = torch.stack(sink_attention).mean() if sink_attention else divergence.new_zeros(())
        is_other = torch.ones_like(windows, dtype=torch.bool)
        is_other[:, 0] = False
        for tokens in sinks.values():
            is_other &= ~tokens
        limits = 0.5 * torch.stack([largest.masked_fill(~is_other, 0).amax() for largest in expected])
        excess = torch.stack(largest_states) / limits.clamp_min(self.hidden_limit) - 1
        return divergence, mass, excess.clamp_min(0).square().mean()

    def _run(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with matmuls_in_bfloat16(self.bfloat16_matmuls):
            return super()._run(model, input_ids, attention_mask)

    def _summed_kl(self, hidden: torch.Tensor, expected_hidden: torch.Tensor) -> torch.Tensor:
        with matmuls_in_bfloat16(self.bfloat16_matmuls):
            return super()._summed_kl(hidden, expected_hidden)

    @contextmanager
    def _found_sinks(self) -> Iterator[dict[int, torch.Tensor]]:
        """Yield a dict that receives the teacher's sinks of the next forward pass: bool [batch, tokens] by layer."""
        sinks: dict[int, torch.Tensor] = {}
        decoder: Any = self.teacher.base_model
        with ExitStack() as stack:
            for number, (layer, direction) in enumerate(zip(decoder.layers, self.directions, strict=True)):
                if direction is not None:
                    hook = partial(self._find_sinks, sinks, number, direction)
                    stack.callback(layer.input_layernorm.register_forward_hook(hook).remove)
            yield sinks

    def _find_sinks(
        self,
        sinks: dict[int, torch.Tensor],
        layer: int,
        direction: SinkDirection,
        module: nn.Module,
        arguments: tuple[Any, ...],
        output: torch.Tensor,
    ) -> None:
        sinks[layer] = direction.tokens(output)


@contextmanager
def _layer_outputs(
    model: PreTrainedModel, summary: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Yield a list that receives a summary of the hidden states after each layer in the next forward pass."""
    summaries: list[torch.Tensor] = []
    decoder: Any = model.base_model
    with ExitStack() as stack:
        for layer in decoder.layers:
            handle = layer.register_forward_hook(lambda module, arguments, output: summaries.append(summary(output)))
            stack.callback(handle.remove)
        yield summaries


def _largest(hidden_states: torch.Tensor) -> torch.Tensor:
    # A norm, because its gradient needs no further tensor of this size.
    return torch.linalg.vector_norm(hidden_states.float(), ord=torch.inf)


def _largest_of_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(hidden_states.float(), ord=torch.inf, dim=-1)

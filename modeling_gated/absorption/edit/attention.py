"""Inputs of an attention function, and attention probabilities computed from them, with gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling_gated.inspection.watching.inspecting import attention_replaced
from modeling_gated.training.chunks import at_least_float32


@dataclass(frozen=True)
class AttentionInputs:
    """
    Inputs of an attention function, for windows without padding.

    Attributes:
        query: queries [batch, heads, tokens, head_dim], after RoPE.
        key: keys [batch, key-value heads, tokens, head_dim], after RoPE.
        value: values [batch, key-value heads, tokens, head_dim].
        scaling: factor of attention logits.
        sliding_window: number of tokens that a query sees, including its own; None for all earlier tokens.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    sliding_window: int | None

    @property
    def group(self) -> int:
        """Return the number of query heads per key-value head."""
        return self.query.shape[1] // self.key.shape[1]

    def probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        """
        Return attention probabilities of some queries.

        Args:
            rows: indices of queries, int64 [rows].

        Returns:
            Probabilities [batch, heads, rows, tokens], float32, or float64 for a float64 model.
        """
        query, key = at_least_float32(self.query[:, :, rows]), at_least_float32(self.key)
        grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [batch, key-value heads, group * rows, ...]
        scores = (grouped @ key.transpose(2, 3)) * self.scaling
        scores = scores.unflatten(2, (-1, len(rows))).flatten(1, 2)
        keys = torch.arange(key.shape[2], device=rows.device)
        hidden = keys > rows[:, None]
        if self.sliding_window is not None:
            hidden |= keys <= rows[:, None] - self.sliding_window
        return scores.masked_fill(hidden, float("-inf")).softmax(-1)

    def to_sinks(self, sinks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """
        Return attention probabilities of queries to sinks. A sink's attention to itself is not counted.

        Args:
            sinks: mask of sinks, bool [batch, tokens].
            rows: indices of queries, int64 [rows].

        Returns:
            Probabilities [batch, heads, rows, tokens]; 0 for tokens that are not sinks.
        """
        is_other_token = torch.arange(sinks.shape[1], device=rows.device) != rows[:, None]
        return self.probabilities(rows) * (sinks[:, None, None] & is_other_token)


@contextmanager
def captured_attention(decoder: nn.Module) -> Iterator[dict[int, AttentionInputs]]:
    """Yield a dict that receives the inputs of the decoder's attention functions, by layer, inside the context."""
    captured: dict[int, AttentionInputs] = {}

    def attention(
        base: Callable[..., Any],
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        **arguments: Any,
    ) -> Any:
        inputs = AttentionInputs(query, key, value, module.scaling, arguments.get("sliding_window"))
        captured[module.layer_idx] = inputs
        return base(module, query, key, value, attention_mask, **arguments)

    with attention_replaced(decoder, attention, lambda base: base):
        yield captured

"""What an attention function is given in one layer, and the probabilities that come of it, with their gradients."""

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
    Of windows without padding: `query` [batch, heads, tokens, head_dim], `key` and `value` [batch, key-value heads,
    tokens, head_dim]. With `sliding_window`, a query sees so many tokens, itself the last.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    sliding_window: int | None

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.query.shape[1] // self.key.shape[1]

    def probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        """
        Args:
            rows: numbers of queries, int64 [rows].

        Returns:
            float32 [batch, heads, rows, tokens]; a float64 model's are float64.
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
        The probability that queries give to sinks, their own token left out: a sink may look at itself.

        Args:
            sinks: which tokens are sinks, bool [batch, tokens].
            rows: numbers of queries, int64 [rows].

        Returns:
            [batch, heads, rows, tokens], 0 where a token is no sink.
        """
        is_other_token = torch.arange(sinks.shape[1], device=rows.device) != rows[:, None]
        return self.probabilities(rows) * (sinks[:, None, None] & is_other_token)


@contextmanager
def captured_attention(decoder: nn.Module) -> Iterator[dict[int, AttentionInputs]]:
    """Inside the `with` block, keep what the attention functions of a decoder's layers are given, by layer."""
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

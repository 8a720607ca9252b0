"""Hooks that watch or change a model's gates where they are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modeling_gated.configuration.configuration_gated_llama import GATE_PROJECTIONS


# Called with the attention block, the paper's position and the gates as `gate_values` returns them.
Change = Callable[[Any, str, torch.Tensor], torch.Tensor]
Watch = Callable[[Any, str, torch.Tensor], None]


def gated_attentions(layers: nn.ModuleList) -> Iterator[tuple[int, Any]]:
    """Yield the attention blocks that have gates of this package, each with the number of its layer."""
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "gate_values") and gate_positions(module):
                yield number, module


def gate_positions(attention: Any) -> dict[str, nn.Module]:
    """Return the projections of an attention block's gates, by the paper's positions."""
    projections = {position: getattr(attention, name) for position, name in GATE_PROJECTIONS.items()}
    return {position: projection for position, projection in projections.items() if projection is not None}


def gates_of_a_head(attention: Any, position: str, rows: int) -> int:
    """Return the number of gates per head at a position. Gates of G5, and shared ones, count as those of one head."""
    if attention.is_headwise:
        return 1
    return rows if position == "G5" else attention.head_dim


@contextmanager
def hooked(attention: Any, *, change: Change | None = None, watch: Watch | None = None) -> Iterator[None]:
    """Change or watch an attention block's gates. A watch is called after all changes, with gates without a graph."""
    hooks = vars(attention).get("gated")
    if hooks is None:
        hooks = attention.gated = _Hooks(attention)
    if change is not None:
        hooks.changes.append(change)
    if watch is not None:
        hooks.watches.append(watch)
    try:
        yield
    finally:
        if change is not None:
            hooks.changes.remove(change)
        if watch is not None:
            hooks.watches.remove(watch)
        if not (hooks.changes or hooks.watches):
            del attention.gated


class _Hooks:
    """Replacement of an attention block's `gated`."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.position_of = {projection: position for position, projection in gate_positions(attention).items()}
        self.changes: list[Change] = []
        self.watches: list[Watch] = []

    def __call__(
        self, states: torch.Tensor, projection: nn.Module | None, gate_input: torch.Tensor, *log_sum_exp: torch.Tensor
    ) -> torch.Tensor:
        if projection is None:
            return states
        logits = self.attention.gate_logits(projection, gate_input, *log_sum_exp)
        gates, position = self.attention.gate_values(logits), self.position_of[projection]
        for change in self.changes:
            gates = change(self.attention, position, gates)
        for watch in self.watches:
            watch(self.attention, position, gates.detach())
        return self.attention.with_gates(states, gates)

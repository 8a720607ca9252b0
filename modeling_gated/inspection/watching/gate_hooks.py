"""Where a model's gates are computed, for those who watch and those who change them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modeling_gated.configuration.configuration_gated_llama import GATE_PROJECTIONS


# What is called with the attention block, the position of the paper and the gates as `gate_values` gives them.
Change = Callable[[Any, str, torch.Tensor], torch.Tensor]
Watch = Callable[[Any, str, torch.Tensor], None]


def gated_attentions(layers: nn.ModuleList) -> Iterator[tuple[int, Any]]:
    """The attention blocks that have gates of this package, each with the number of its layer."""
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "gated_by") and gate_positions(module):
                yield number, module


def gate_positions(attention: Any) -> dict[str, nn.Module]:
    """The projections of an attention block's gates, by the paper's positions."""
    found = {position: getattr(attention, name) for position, name in GATE_PROJECTIONS.items()}
    return {position: projection for position, projection in found.items() if projection is not None}


def gates_of_a_head(attention: Any, position: str, rows: int) -> int:
    """How many of a position's gates one head has; those of G5, and those that heads share, are of one head."""
    if attention.is_headwise:
        return 1
    return rows if position == "G5" else attention.head_dim


@contextmanager
def hooked(attention: Any, *, change: Change | None = None, watch: Watch | None = None) -> Iterator[None]:
    """Change or watch an attention block's gates. Whoever watches sees them as all changes have left them."""
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
    """Stands in the place of a block's own `gated`."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.position_of = {projection: position for position, projection in gate_positions(attention).items()}
        self.changes: list[Change] = []
        self.watches: list[Watch] = []

    def __call__(self, states: torch.Tensor, projection: nn.Module | None, gate_input: torch.Tensor) -> torch.Tensor:
        if projection is None:
            return states
        logits, position = projection(gate_input), self.position_of[projection]
        # Whoever watches alone leaves the computation what it is, and what it keeps for the backward pass.
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.changes)):
            gates = self.attention.gate_values(logits)
        for change in self.changes:
            gates = change(self.attention, position, gates)
        for watch in self.watches:
            watch(self.attention, position, gates)
        return self.attention.with_gates(states, gates) if self.changes else self.attention.gated_by(states, logits)

"""Changing what a model's gates do, to see what its predictions lose."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_gated.configuration.configuration_gated_llama import GATE_PROJECTIONS
from modeling_gated.errors import InspectionError
from modeling_gated.inspection.watching.gate_hooks import (
    Change,
    gate_positions,
    gated_attentions,
    gates_of_a_head,
    hooked,
)
from modeling_gated.inspection.watching.inspecting import decoder_layers
from modeling_gated.inspection.watching.tokens import watched_tokens


@contextmanager
def forced_gates(
    model: PreTrainedModel,
    value: float,
    *,
    layer: int | None = None,
    head: int | None = None,
    position: str | None = None,
) -> Iterator[None]:
    """
    Force gates to a constant inside the `with` block.

    Args:
        model: a model of this package.
        value: what the attention is multiplied by, or, if gates are additive, what is added; `gate_scale` is in it.
        layer: of this layer only.
        head: of this head only; of a key-value head where the position is G2 or G3.
        position: of this position of the paper only, such as `"G1"`.

    Raises:
        InspectionError: if there are no such gates.
    """

    places = list(GATE_PROJECTIONS) if position is None else [position]

    def forced(attention: Any, place: str, gates: torch.Tensor) -> torch.Tensor:
        if place not in places:
            return gates
        if head is None:
            return torch.full_like(gates, value)
        size = gates_of_a_head(attention, place, gates.shape[-1])
        gates = gates.clone()
        gates[..., head * size : (head + 1) * size] = value
        return gates

    attentions = _gated(model, layer, places)
    if head is not None:
        _check_head(attentions, places, head)
    with _changed(attentions, forced):
        yield


def closed_gates(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Force all gates to 0 inside the `with` block."""
    return forced_gates(model, 0.0)


def open_gates(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Force all gates to 1 inside the `with` block."""
    return forced_gates(model, 1.0)


@contextmanager
def shuffled_gates(model: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """
    Shuffle the gates of each layer among the tokens of an input inside the `with` block, those of all heads
    together; padding keeps its own. What is lost is what gates do that depends on the token.

    Args:
        model: a model of this package.
        seed: of the permutations, one per forward pass, layer, position and input.

    Raises:
        InspectionError: if the model has no gates.
    """
    generator = torch.Generator().manual_seed(seed)
    with watched_tokens(model) as watch:

        def shuffled(attention: Any, place: str, gates: torch.Tensor) -> torch.Tensor:
            if gates.ndim < 3:  # independent of the input
                return gates
            gates = gates.clone()
            for sequence, real in enumerate(watch.tokens(gates.device).current):
                places = real.nonzero().flatten()
                order = torch.randperm(len(places), generator=generator).to(places.device)
                gates[sequence, places] = gates[sequence, places[order]]
            return gates

        with _changed(_gated(model, None, list(GATE_PROJECTIONS)), shuffled):
            yield


def _gated(model: PreTrainedModel, layer: int | None, places: list[str]) -> list[Any]:
    """Return the attention blocks of a layer, or of all, with gates at one of these positions."""
    layers = decoder_layers(model.get_decoder())
    if layer is not None and not 0 <= layer < len(layers):
        raise InspectionError(f"layer must be from 0 to {len(layers) - 1}, got {layer}")
    if unknown := [place for place in places if place not in GATE_PROJECTIONS]:
        raise InspectionError(f"positions must be among {', '.join(GATE_PROJECTIONS)}, got {unknown[0]!r}")
    attentions = [
        attention
        for number, attention in gated_attentions(layers)
        if layer in (None, number) and not set(places).isdisjoint(gate_positions(attention))
    ]
    if not attentions:
        at = f" at {places[0]}" if len(places) == 1 else ""
        raise InspectionError(f"{type(model).__name__}: has no gates{at}")
    return attentions


def _check_head(attentions: list[Any], places: list[str], head: int) -> None:
    for attention in attentions:
        for place, projection in gate_positions(attention).items():
            rows: Any = projection.out_features
            heads = rows // gates_of_a_head(attention, place, rows)
            is_shared = attention.config.gate_head_shared or place == "G5"
            if place in places and (is_shared or not 0 <= head < heads):
                raise InspectionError(f"head {head}: there is no gate of this head at {place}")


@contextmanager
def _changed(attentions: list[Any], change: Change) -> Iterator[None]:
    with ExitStack() as stack:
        for attention in attentions:
            stack.enter_context(hooked(attention, change=change))
        yield

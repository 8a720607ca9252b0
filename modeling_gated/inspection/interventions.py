"""Changing what a model's gates or its sink do, to see what its predictions lose."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import and_masks

from modeling_gated.configuration.configuration_gated_llama import GATE_PROJECTIONS

from .errors import InspectionError, UnknownAttention
from .gate_hooks import Change, gate_positions, gated_attentions, gates_of_a_head, hooked
from .inspecting import attention_replaced, decoder_layers
from .masks import ChangedMask
from .tokens import watched_tokens


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
    Deal the gates of each layer out anew among the tokens of an input inside the `with` block, those of all heads
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


@contextmanager
def masked_first_token(model: PreTrainedModel, after: int = 0) -> Iterator[None]:
    """
    Hide the first token of each sequence from later ones inside the `with` block.

    Hidden from all of them, it loses its work to the second token, which then becomes the sink, so that little may be
    lost; hidden from those alone that come more than some tokens after it, it has already left its mark on the others.

    Args:
        model: any model of Transformers' whose attention goes through its attention interface, by another function
            than flash attention, which takes no mask, and which makes its masks while it runs: not Gemma 3 with images,
            nor any in generation with a static cache.
        after: tokens at no more than this distance from the first still see it.

    Raises:
        UnknownAttention: if the model takes no mask, or none that can be changed.
    """
    decoder: Any = model.get_decoder()
    base = decoder.config._attn_implementation
    if "flash" in base:
        raise UnknownAttention(f"attn_implementation={base!r}: takes no mask, so no token can be hidden; use 'sdpa'")
    with watched_tokens(model) as watch:
        masked_passes = attended_passes = 0

        def change(arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal masked_passes
            masked_passes = watch.passes
            starts = watch.tokens(torch.device(arguments["device"])).starts

            def not_first(batch: Any, head: Any, query: Any, key: Any) -> Any:
                start = starts[batch, query]
                return (key != start) | (query - start <= after)

            both = and_masks(arguments["mask_function"], not_first)
            return arguments | {"mask_function": both, "allow_is_causal_skip": False}

        def attention(base: Callable[..., Any], module: nn.Module, *inputs: Any, **arguments: Any) -> Any:
            nonlocal attended_passes
            attended_passes = watch.passes
            if masked_passes != watch.passes:
                raise UnknownAttention("attention_mask: a mask that is given whole is not changed")
            return base(module, *inputs, **arguments)

        with attention_replaced(decoder, attention, lambda base_mask: ChangedMask(base_mask, change)):
            yield
        if attended_passes != watch.passes:
            raise UnknownAttention(f"{type(model).__name__}: no attention in which a token could be hidden")


def _gated(model: PreTrainedModel, layer: int | None, places: list[str]) -> list[Any]:
    """The attention blocks of a layer, or of all, with gates at one of these positions."""
    layers = decoder_layers(model.get_decoder())
    if layer is not None and not 0 <= layer < len(layers):
        raise InspectionError(f"layer {layer}: the model has layers 0 to {len(layers) - 1}")
    if unknown := [place for place in places if place not in GATE_PROJECTIONS]:
        raise InspectionError(f"position {unknown[0]!r}: is not among {', '.join(GATE_PROJECTIONS)}")
    found = [
        attention
        for number, attention in gated_attentions(layers)
        if layer in (None, number) and not set(places).isdisjoint(gate_positions(attention))
    ]
    if not found:
        at = f" at {places[0]}" if len(places) == 1 else ""
        raise InspectionError(f"{type(model).__name__}: has no gates{at}")
    return found


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


@dataclass(frozen=True)
class Intervention:
    """
    An intervention by its name: `masked_first_token` (`masked_first_token@64`: from tokens more than 64 after it),
    `closed_gates`, `open_gates`, `shuffled_gates`, or `gates=0.5`, which forces all gates, `gates=0.5@7` those of layer
    7 and `gates=0.5@7.2` those of its head 2.
    """

    name: str
    needs_gates: bool
    apply: Callable[[PreTrainedModel], AbstractContextManager[None]]

    @classmethod
    def parse(cls, name: str) -> "Intervention":
        """
        Raises:
            InspectionError: if there is none of this name.
        """
        if name in _NAMED:
            return cls(name, name != "masked_first_token", _NAMED[name])
        if found := re.fullmatch(r"masked_first_token@(\d{1,9})", name):
            after = int(found[1])
            return cls(name, False, lambda model: masked_first_token(model, after))
        found = re.fullmatch(r"gates=(-?[0-9.]+)(?:@(\d{1,9})(?:\.(\d{1,9}))?)?", name)
        try:
            value, layer, head = (found[1], found[2], found[3]) if found else ("", None, None)
            number = float(value)
        except ValueError:
            known = ", ".join((*_NAMED, "masked_first_token@DISTANCE", "gates=VALUE[@LAYER[.HEAD]]"))
            raise InspectionError(f"intervention {name!r} is not among {known}") from None
        where: dict[str, Any] = {key: int(digits) for key, digits in (("layer", layer), ("head", head)) if digits}
        return cls(name, True, lambda model: forced_gates(model, number, **where))


_NAMED: dict[str, Callable[[PreTrainedModel], AbstractContextManager[None]]] = {
    "masked_first_token": masked_first_token,
    "closed_gates": closed_gates,
    "open_gates": open_gates,
    "shuffled_gates": shuffled_gates,
}

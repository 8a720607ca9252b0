"""Interventions by the names that the command line and reports have for them."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from modeling_gated.errors import InspectionError

from .gates import closed_gates, forced_gates, open_gates, shuffled_gates
from .masking import masked_first_token, windowed_attention
from .rounding import int8_activations, int8_weights


@dataclass(frozen=True)
class Intervention:
    """
    An intervention by its name: `masked_first_token` (`masked_first_token@64`: from tokens more than 64 after it),
    `window=128` (`window=128+4`: and the first four tokens), `int8_weights`, `int8_activations`, `closed_gates`,
    `open_gates`, `shuffled_gates`, or `gates=0.5`, which forces all gates, `gates=0.5@7` those of layer 7 and
    `gates=0.5@7.2` those of its head 2.
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
            return cls(name, name.endswith("_gates"), _NAMED[name])
        if match := re.fullmatch(r"masked_first_token@(\d{1,9})", name):
            after = int(match[1])
            return cls(name, False, lambda model: masked_first_token(model, after))
        if match := re.fullmatch(r"window=(\d{1,9})(?:\+(\d{1,9}))?", name):
            window, first = int(match[1]), int(match[2] or 0)
            if window < 1:
                raise InspectionError(f"the window of an intervention must have at least 1 token, got {name!r}")
            return cls(name, False, lambda model: windowed_attention(model, window, first))
        match = re.fullmatch(r"gates=(-?[0-9.]+)(?:@(\d{1,9})(?:\.(\d{1,9}))?)?", name)
        try:
            value, layer, head = (match[1], match[2], match[3]) if match else ("", None, None)
            number = float(value)
        except ValueError:
            known = ", ".join(
                (*_NAMED, "masked_first_token@DISTANCE", "window=TOKENS[+FIRST]", "gates=VALUE[@LAYER[.HEAD]]")
            )
            raise InspectionError(f"interventions must be among {known}, got {name!r}") from None
        where: dict[str, Any] = {key: int(digits) for key, digits in (("layer", layer), ("head", head)) if digits}
        return cls(name, True, lambda model: forced_gates(model, number, **where))


_NAMED: dict[str, Callable[[PreTrainedModel], AbstractContextManager[None]]] = {
    "masked_first_token": masked_first_token,
    "int8_weights": int8_weights,
    "int8_activations": int8_activations,
    "closed_gates": closed_gates,
    "open_gates": open_gates,
    "shuffled_gates": shuffled_gates,
}

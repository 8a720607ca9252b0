"""The names of the layers that gates come from, wherever they stand in a model."""

from .configuration.configuration_gated_llama import GATE_PROJECTIONS


GATE_NAMES = frozenset(GATE_PROJECTIONS.values())


def is_gate(name: str) -> bool:
    """Whether a parameter's or a module's name is a gate's or of a part of one, as PEFT and FSDP make them."""
    return not GATE_NAMES.isdisjoint(name.split("."))

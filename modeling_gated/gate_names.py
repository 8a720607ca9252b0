"""The names of the layers that gates come from, wherever they stand in a model."""

from .configuration.configuration_gated_llama import GATE_PROJECTIONS


GATE_NAMES = frozenset(GATE_PROJECTIONS.values())
# The gates of all positions, as a pattern for full names of modules.
ALL_GATES = r".*\.g_(.*_)?proj"
# What quantization by Transformers leaves alone where it is given no list.
OUTPUT_LAYERS = ("lm_head", "score", "qa_outputs")
# What to give it instead: the same, and the gates.
MODULES_TO_NOT_CONVERT = [*OUTPUT_LAYERS, ALL_GATES]


def is_gate(name: str) -> bool:
    """Return whether a parameter or module belongs to a gate by its name, also as PEFT and FSDP rename it."""
    return not GATE_NAMES.isdisjoint(name.split("."))

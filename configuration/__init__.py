"""Configuration of GatedLlama, and the extension of a model's context."""

from .configuration_gated_llama import GatedLlamaConfig, carried_source_files
from .context_extension import ContextExtension, describe_context, extend_context
from .gate_opening import OPEN_GATE_WEIGHT, initial_gate_bias, initial_gate_weight, open_gate
from .source_families import SOURCE_FAMILIES, check_source_family


__all__ = [
    "OPEN_GATE_WEIGHT",
    "SOURCE_FAMILIES",
    "ContextExtension",
    "GatedLlamaConfig",
    "carried_source_files",
    "check_source_family",
    "describe_context",
    "extend_context",
    "initial_gate_bias",
    "initial_gate_weight",
    "open_gate",
]

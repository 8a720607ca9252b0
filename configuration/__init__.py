"""Configuration of GatedLlama."""

from .configuration_gated_llama import SOURCE_FAMILIES, GatedLlamaConfig, check_source_family
from .gate_opening import initial_gate_bias, open_gate


__all__ = ["SOURCE_FAMILIES", "GatedLlamaConfig", "check_source_family", "initial_gate_bias", "open_gate"]

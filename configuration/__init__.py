"""Configuration of GatedLlama."""

from .configuration_gated_llama import SOURCE_FAMILIES, GatedLlamaConfig, open_gate


__all__ = ["SOURCE_FAMILIES", "GatedLlamaConfig", "open_gate"]

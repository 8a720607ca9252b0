"""Checkpoints in, gated checkpoints out."""

from .convert import Conversion, convert_checkpoint
from .errors import ConversionError
from .gguf import dequantize_gguf


__all__ = ["Conversion", "ConversionError", "convert_checkpoint", "dequantize_gguf"]

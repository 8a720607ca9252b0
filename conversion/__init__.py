"""Checkpoints in, gated checkpoints out."""

from .convert import Conversion, convert_checkpoint, plan_conversion
from .errors import ConversionError
from .gguf import dequantize_gguf
from .plan import Plan
from .ungate import Restoration, ungate_checkpoint
from .verify import Verification, verify_checkpoint


__all__ = [
    "Conversion",
    "ConversionError",
    "Plan",
    "Restoration",
    "Verification",
    "convert_checkpoint",
    "dequantize_gguf",
    "plan_conversion",
    "ungate_checkpoint",
    "verify_checkpoint",
]

"""Checkpoints in, gated checkpoints out."""

from .convert import Conversion, convert_checkpoint, plan_conversion
from .errors import ConversionError
from .extend import ExtendedCheckpoint, extend_checkpoint
from .gguf import dequantize_gguf
from .plan import Plan
from .ungate import Restoration, ungate_checkpoint
from .verify import Verification, verify_checkpoint


__all__ = [
    "Conversion",
    "ConversionError",
    "ExtendedCheckpoint",
    "Plan",
    "Restoration",
    "Verification",
    "convert_checkpoint",
    "dequantize_gguf",
    "extend_checkpoint",
    "plan_conversion",
    "ungate_checkpoint",
    "verify_checkpoint",
]

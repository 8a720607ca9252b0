"""Checkpoints in, gated checkpoints out."""

from modeling_gated.errors import ConversionError

from .convert import Conversion, convert_checkpoint, plan_conversion
from .extend import ExtendedCheckpoint, extend_checkpoint
from .gguf import dequantize_gguf
from .plan import Plan
from .refresh import RefreshedCode, refresh_code
from .repair import RepairedTokenizer, repair_tokenizer
from .ungate import Restoration, ungate_checkpoint
from .verify import Verification, verify_checkpoint


__all__ = [
    "Conversion",
    "ConversionError",
    "ExtendedCheckpoint",
    "Plan",
    "RefreshedCode",
    "RepairedTokenizer",
    "Restoration",
    "Verification",
    "convert_checkpoint",
    "dequantize_gguf",
    "extend_checkpoint",
    "plan_conversion",
    "refresh_code",
    "repair_tokenizer",
    "ungate_checkpoint",
    "verify_checkpoint",
]

"""
Attention output gates (arXiv 2505.06708) for Llama-family models in Transformers.

Importing this package makes Transformers' Auto classes know `gated_llama`, as a base model and with every head.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING


# Links to ../configuration and ../conversion in a clone; a clone on Windows may have text files instead of links.
if not (Path(__path__[0]) / "configuration").is_dir():
    __path__.append(str(Path(__path__[0]).parent))

# The gated-llama command needs neither torch nor the model to answer --help, so it imports what it needs itself.
if TYPE_CHECKING or Path(sys.argv[0] if sys.argv else "").name not in ("gated-llama", "gated-llama.exe"):
    from . import registration  # noqa: F401
    from .configuration import GatedLlamaConfig
    from .gate_names import MODULES_TO_NOT_CONVERT
    from .modeling_gated_llama import (
        GatedLlamaForCausalLM,
        GatedLlamaForQuestionAnswering,
        GatedLlamaForSequenceClassification,
        GatedLlamaForTokenClassification,
        GatedLlamaModel,
        GatedLlamaPreTrainedModel,
    )
    from .training import Distillation, GateTrainerMixin, gate_param_groups, gate_peft_config, keep_float32_states

    __all__ = [
        "MODULES_TO_NOT_CONVERT",
        "Distillation",
        "GateTrainerMixin",
        "GatedLlamaConfig",
        "GatedLlamaForCausalLM",
        "GatedLlamaForQuestionAnswering",
        "GatedLlamaForSequenceClassification",
        "GatedLlamaForTokenClassification",
        "GatedLlamaModel",
        "GatedLlamaPreTrainedModel",
        "gate_param_groups",
        "gate_peft_config",
        "keep_float32_states",
    ]

"""Training gated models: parameters and optimizers, PEFT, Trainer, distillation."""

from .chunks import sum_over_chunks
from .distillation import Distillation, DistillationOutput, share_frozen_parameters, ungated
from .float32_states import keep_float32_states
from .gate_parameters import gate_param_groups
from .peft import gate_peft_config
from .trainer import GateTrainerMixin


__all__ = [
    "Distillation",
    "DistillationOutput",
    "GateTrainerMixin",
    "gate_param_groups",
    "gate_peft_config",
    "keep_float32_states",
    "share_frozen_parameters",
    "sum_over_chunks",
    "ungated",
]

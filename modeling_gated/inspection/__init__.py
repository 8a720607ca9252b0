"""Attention sinks, massive activations and gates of any causal language model: meters, interventions and a report."""

from modeling_gated.errors import InspectionError, UnknownAttention

from .callback import InspectionCallback
from .interventions.gates import closed_gates, forced_gates, open_gates, shuffled_gates
from .interventions.masking import masked_first_token, windowed_attention
from .interventions.rounding import int8_activations, int8_weights
from .meters import REPORT_METERS
from .meters.activation_meters import (
    Activation,
    HiddenMaxima,
    Int8Errors,
    LayerActivations,
    MassiveActivations,
    QuantizationError,
)
from .meters.attention_meters import (
    AttentionEntropy,
    EffectiveRank,
    FirstTokenAttention,
    KeyValueNorms,
    ShortSinkRate,
    SinkNorms,
    SinkRate,
    SinkRates,
)
from .meters.gate_meters import GateDrift, GateScores, GateStatistics
from .report.report import ModelReport, inspect_model
from .watching.attention_rows import AttentionRows
from .watching.inspecting import inspecting
from .watching.meter import Meter, SummaryRow
from .watching.tokens import Tokens


__all__ = [
    "REPORT_METERS",
    "Activation",
    "AttentionEntropy",
    "AttentionRows",
    "EffectiveRank",
    "FirstTokenAttention",
    "GateDrift",
    "GateScores",
    "GateStatistics",
    "HiddenMaxima",
    "InspectionCallback",
    "InspectionError",
    "Int8Errors",
    "KeyValueNorms",
    "LayerActivations",
    "MassiveActivations",
    "Meter",
    "ModelReport",
    "QuantizationError",
    "ShortSinkRate",
    "SinkNorms",
    "SinkRate",
    "SinkRates",
    "SummaryRow",
    "Tokens",
    "UnknownAttention",
    "closed_gates",
    "forced_gates",
    "inspect_model",
    "inspecting",
    "int8_activations",
    "int8_weights",
    "masked_first_token",
    "open_gates",
    "shuffled_gates",
    "windowed_attention",
]

"""Attention sinks, massive activations and gates of any causal language model: meters, interventions and a report."""

from modeling_gated.errors import InspectionError, UnknownAttention

from .activation_meters import (
    Activation,
    HiddenMaxima,
    Int8Errors,
    LayerActivations,
    MassiveActivations,
    QuantizationError,
)
from .attention_meters import (
    AttentionEntropy,
    EffectiveRank,
    FirstTokenAttention,
    KeyValueNorms,
    SinkNorms,
    SinkRate,
    SinkRates,
)
from .attention_rows import AttentionRows
from .callback import InspectionCallback
from .gate_meters import GateDrift, GateScores, GateStatistics
from .inspecting import inspecting
from .interventions import closed_gates, forced_gates, open_gates, shuffled_gates
from .masking import masked_first_token, windowed_attention
from .meter import Meter
from .report import ModelReport, inspect_model
from .rounding import int8_activations, int8_weights
from .tokens import Tokens


__all__ = [
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
    "SinkNorms",
    "SinkRate",
    "SinkRates",
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

"""Meters of attention, activations and gates."""

from modeling_gated.inspection.watching.meter import Meter

from .activation_meters import MassiveActivations, QuantizationError
from .attention_meters import (
    AttentionEntropy,
    EffectiveRank,
    FirstTokenAttention,
    KeyValueNorms,
    ShortSinkRate,
    SinkRate,
)
from .gate_meters import GateScores


# Those of a report. Rows of its summary are in this order.
REPORT_METERS: tuple[type[Meter], ...] = (
    FirstTokenAttention,
    SinkRate,
    ShortSinkRate,
    AttentionEntropy,
    MassiveActivations,
    QuantizationError,
    KeyValueNorms,
    EffectiveRank,
    GateScores,
)

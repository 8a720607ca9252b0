"""Moving what attention sinks do into gates: a checkpoint in, one without sinks and massive activations out."""

from modeling_gated.errors import AbsorptionError

from .absorb import Absorption, absorb_checkpoint
from .closed_form import AbsorbedLayer
from .editing import Edit, absorb_sinks
from .proof import Comparison, Measured, Windows, compare, prove
from .settings import AbsorptionSettings
from .sinks import SinkDirection
from .writers import Writer, find_writers, remove_writers


__all__ = [
    "AbsorbedLayer",
    "Absorption",
    "AbsorptionError",
    "AbsorptionSettings",
    "Comparison",
    "Edit",
    "Measured",
    "SinkDirection",
    "Windows",
    "Writer",
    "absorb_checkpoint",
    "absorb_sinks",
    "compare",
    "find_writers",
    "prove",
    "remove_writers",
]

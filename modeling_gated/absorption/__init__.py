"""Moving what attention sinks do into gates: a checkpoint in, one without sinks and massive activations out."""

from modeling_gated.errors import AbsorptionError

from .absorb import absorb_checkpoint
from .comparison import Comparison, Measured, Windows, compare, prove
from .edit.closed_form import AbsorbedLayer
from .edit.model import Edit, absorb_sinks
from .edit.sinks import SinkDirection
from .edit.writers import Writer, find_writers, remove_writers
from .result import Absorption
from .settings import AbsorptionSettings


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

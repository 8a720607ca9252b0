"""
Removal of attention sinks and massive activations from a checkpoint.

An attention sink is a token, usually the first, that receives a large share of the attention. A massive activation is a
hidden state above 100 and about 1,000 times the median (arXiv 2402.17762). Attention output gates (arXiv 2505.06708)
replace the function of sinks.
"""

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

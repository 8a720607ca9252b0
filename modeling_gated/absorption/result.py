"""The record of a run of `absorb_checkpoint`, as `absorption.json` keeps it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .comparison import Comparison
from .edit.closed_form import AbsorbedLayer
from .edit.writers import Writer
from .run_identity import RunIdentity
from .settings import AbsorptionSettings


REPORT_NAME = "absorption.json"
_FORMAT = 1


@dataclass(frozen=True)
class Absorption:
    """
    Record of a run of `absorb_checkpoint`.

    Attributes:
        output: directory of the result.
        identity: source checkpoint, texts, settings and dtype of the run, with the values that were used.
        writers: neurons that wrote massive activations and were removed, as in `Edit`.
        layers: edits of each layer, as in `Edit`.
        losses: training loss of each distillation step.
        distilled_tokens: number of tokens in the distillation steps.
        validation_losses: loss on validation text, every `settings.evaluate_every` steps.
        comparisons: comparisons of the result with the source model on held-out text.
        seconds: duration of each step in seconds, summed over all interrupted runs.
        notes: notes for the user, such as the reason why no chats were sampled.
    """

    output: Path
    identity: RunIdentity
    writers: list[Writer]
    layers: list[AbsorbedLayer]
    losses: list[float]
    distilled_tokens: int
    validation_losses: list[float]
    comparisons: list[Comparison]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> AbsorptionSettings:
        """Return the settings of the run, with the window lengths that were used."""
        return self.identity.settings

    def as_json(self) -> str:
        """Return the content of `absorption.json`."""
        content = {
            "format": _FORMAT,
            "output": self.output.name,
            **self.identity.record(),
            "settings": asdict(self.settings),
            "writers": [asdict(writer) for writer in self.writers],
            "layers": [asdict(layer) for layer in self.layers],
            "losses": self.losses,
            "distilled_tokens": self.distilled_tokens,
            "validation_losses": self.validation_losses,
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
        return json.dumps(content, indent=2) + "\n"

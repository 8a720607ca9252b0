"""The result of absorbing a checkpoint's sinks, as a report keeps it."""

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
    What was done to a checkpoint, and what came of it: the `identity` with the settings as they were, `writers` and
    `layers` as of `Edit`, the `losses` of the distillation's steps, which had so many `distilled_tokens`, and its
    `validation_losses`, every `settings.evaluate_every` steps, and how the model in `output` compares with the
    original. `notes` are for the user, such as why no chats were sampled.
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
        return self.identity.settings

    def as_json(self) -> str:
        """The content of `absorption.json`."""
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

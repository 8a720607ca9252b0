"""A checkpoint with attention sinks in, one without them out; every step is kept until the result is complete."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from modeling_gated.conversion.command_line import command_line
from modeling_gated.conversion.files import sync
from modeling_gated.conversion.output import check_output, replacing
from modeling_gated.conversion.plan import CARD_NAME
from modeling_gated.conversion.sources import find_source
from modeling_gated.evaluation.text import read_text
from modeling_gated.training.loop import read_losses

from .card import absorption_card
from .closed_form import AbsorbedLayer
from .distilling import STAGE
from .models import gated_original, load_tokenizer
from .proof import Comparison
from .settings import AbsorptionSettings
from .work import Work, begin
from .writers import Writer


REPORT_NAME = "absorption.json"
_FORMAT = 1


@dataclass(frozen=True)
class Absorption:
    """
    What was done to a checkpoint, and what came of it: `writers` and `layers` as of `Edit`, the `losses` of the
    distillation's steps and its `held_out_losses`, and how the model in `output` compares with the original.
    """

    output: Path
    settings: AbsorptionSettings
    writers: list[Writer]
    layers: list[AbsorbedLayer]
    losses: list[float]
    held_out_losses: list[float]
    comparisons: list[Comparison]
    seconds: dict[str, float]

    def as_json(self) -> str:
        """The content of `absorption.json`."""
        content = {"format": _FORMAT} | asdict(self) | {"output": self.output.name}
        content["comparisons"] = [comparison.as_dict() for comparison in self.comparisons]
        return json.dumps(content, indent=2) + "\n"


def absorb_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    text: Sequence[str | os.PathLike] = (),
    settings: AbsorptionSettings | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> Absorption:
    """
    Write a gated checkpoint that predicts what `checkpoint` does without its attention sinks and massive activations.

    What it takes long to make is kept in `OUTPUT.partial`, from which the same call goes on after an interruption. The
    result appears under its name when it is complete, with what was measured in its model card and in
    `absorption.json`; then `OUTPUT.partial` is removed.

    Args:
        checkpoint: whatever can be converted, or a gated checkpoint whose gates are 1, as conversion writes them.
        output: the directory to make.
        text: files, UTF-8, to distil on beside what the original writes itself, instead of the default's prose,
            documentation and code. Of each the last quarter is held out.
        settings: how to go about it.
        dtype: what to compute in; if not given, float32 on a CPU, bfloat16 elsewhere. The result has the dtype of the
            checkpoint.
        device: if not given, the GPU if there is one.
        overwrite: replace `output` if it is an empty directory or a checkpoint.
        revision: the branch, tag or commit of a model on the hub.
        progress: show progress bars, on a terminal.

    Raises:
        AbsorptionError: if the checkpoint's sinks cannot be absorbed, or `OUTPUT.partial` is of another call.
        ConversionError: if the checkpoint cannot be read, or the output not be written.
        EvaluationError: if a text cannot be read.
    """
    settings = settings or AbsorptionSettings()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    output, paths = Path(output).resolve(), [Path(path).resolve() for path in text]
    flags = {"text": paths} | {name: getattr(settings, name) for name in ("distill_tokens", "sample_tokens", "seed")}
    command = command_line("absorb", checkpoint, output, flags | {"revision": revision}, overwrite)
    source = find_source(os.fspath(checkpoint), revision)
    check_output(source.path, output, overwrite)
    for path in paths:
        read_text(path)
    folder = output.with_name(f"{output.name}.partial")
    given = {"checkpoint": os.fspath(source.path), "text": [os.fspath(path) for path in paths], "dtype": str(dtype)}
    begin(folder, given | asdict(settings))
    original = gated_original(os.fspath(checkpoint), folder / "original", revision, progress)
    work = Work(folder, original, load_tokenizer(original), settings, dtype, device, progress)
    texts = work.texts(paths)
    edit = work.edit(texts)
    distilled = work.distil(texts, edit)
    comparisons = work.prove(distilled, texts)
    done = Absorption(
        output=output,
        settings=settings,
        writers=edit.writers,
        layers=edit.layers,
        losses=read_losses(folder, STAGE),
        held_out_losses=read_losses(folder, STAGE, "held_out"),
        comparisons=comparisons,
        seconds=work.seconds,
    )
    with replacing(output, overwrite) as staging:
        for path in distilled.iterdir():
            shutil.copy2(path, staging / path.name)
        (staging / REPORT_NAME).write_text(done.as_json(), encoding="utf-8")
        (staging / CARD_NAME).write_text(absorption_card(done, source, original, command), encoding="utf-8")
        for path in staging.iterdir():
            sync(path)
    shutil.rmtree(folder)
    return done

"""A checkpoint with attention sinks in, one without them out; every step is kept until the result is complete."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from modeling_gated.conversion.architecture import read_gated_config, stored_dtype
from modeling_gated.conversion.checkpoint import open_checkpoint
from modeling_gated.conversion.command_line import command_line
from modeling_gated.conversion.errors import ConversionError
from modeling_gated.conversion.files import sha256, sync
from modeling_gated.conversion.output import check_output, clear_leftovers, replacing
from modeling_gated.conversion.plan import CARD_NAME, OWN_FILES
from modeling_gated.conversion.shards import copy_side_files
from modeling_gated.conversion.sources import find_source
from modeling_gated.training.loop import read_losses

from .card import absorption_card
from .closed_form import AbsorbedLayer
from .distilling import STAGE
from .errors import AbsorptionError
from .inputs import Inputs
from .models import gated_original, load_tokenizer
from .proof import Comparison
from .settings import AbsorptionSettings
from .texts import check_texts
from .work import Work, begin
from .writers import Writer


REPORT_NAME = "absorption.json"
_FORMAT = 1


@dataclass(frozen=True)
class Absorption:
    """
    What was done to a checkpoint, and what came of it: the `inputs` with the settings as they were, `writers` and
    `layers` as of `Edit`, the `losses` of the distillation's steps and its `validation_losses`, every
    `settings.evaluate_every` steps, and how the model in `output` compares with the original.
    """

    output: Path
    inputs: Inputs
    writers: list[Writer]
    layers: list[AbsorbedLayer]
    losses: list[float]
    validation_losses: list[float]
    comparisons: list[Comparison]
    seconds: dict[str, float]

    @property
    def settings(self) -> AbsorptionSettings:
        return self.inputs.settings

    def as_json(self) -> str:
        """The content of `absorption.json`."""
        content = {
            "format": _FORMAT,
            "output": self.output.name,
            **self.inputs.record(),
            "settings": asdict(self.settings),
            "writers": [asdict(writer) for writer in self.writers],
            "layers": [asdict(layer) for layer in self.layers],
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
            "seconds": self.seconds,
        }
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
            documentation and code. Of each the last quarter is held out, and a twentieth before it decides when
            training is enough.
        settings: how to go about it.
        dtype: what to compute in; if not given, float32 on a CPU, elsewhere that of the checkpoint, which the result
            has: with a coarser one all its tensors are rounded.
        device: if not given, the GPU if there is one.
        overwrite: replace `output` if it is an empty directory or a checkpoint.
        revision: the branch, tag or commit of a model on the hub.
        progress: show progress bars, on a terminal.

    Raises:
        AbsorptionError: if the checkpoint's gates are not 1 or its weights are quantized, a text is too short, or
            `OUTPUT.partial` is damaged or of another call.
        ConversionError: if the checkpoint cannot be read, or the output not be written.
        EvaluationError: if a text cannot be read.
    """
    settings = settings or AbsorptionSettings()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output, paths = Path(output).resolve(), [Path(path) for path in text]
    flags = {"text": paths} | {name: getattr(settings, name) for name in ("distill_tokens", "sample_tokens", "seed")}
    command = command_line("absorb", checkpoint, output, flags | {"revision": revision}, overwrite)
    source = find_source(os.fspath(checkpoint), revision)
    check_output(source.path, output, overwrite)
    check_texts(paths)
    clear_leftovers(output)
    folder = output.with_name(f"{output.name}.partial")
    try:
        inputs = Inputs(source, {path: sha256(path) for path in paths}, settings, dtype)
        begin(folder, inputs.identity())
        work = _prepared(inputs, folder, device, progress)
        done, distilled = _absorbed(work, inputs, output)
        with replacing(output, overwrite) as staging:
            _write(done, work.original, distilled, staging, command)
        done_with = folder.with_name(f".{folder.name}")  # under its name it is whole or not there
        folder.rename(done_with)
        shutil.rmtree(done_with)
    except OSError as error:
        raise AbsorptionError(f"{error.filename or output}: {error.strerror or error}") from error
    return done


def _prepared(inputs: Inputs, folder: Path, device: torch.device, progress: bool) -> Work:
    """The steps, of the original with gates that are 1."""
    try:
        path = gated_original(inputs.source, folder / "original", progress)
    except (AbsorptionError, ConversionError):
        if not (folder / "sampled.json").is_file():  # what is refused leaves nothing behind
            shutil.rmtree(folder)
        raise
    original = open_checkpoint(path)
    limit = read_gated_config(original).max_position_embeddings
    lengths = {name: min(getattr(inputs.settings, name), limit) for name in ("window_tokens", "long_window_tokens")}
    dtype = inputs.dtype or (torch.float32 if device.type == "cpu" else stored_dtype(original))
    return Work(folder, path, load_tokenizer(path), replace(inputs.settings, **lengths), dtype, device, progress)


def _absorbed(work: Work, inputs: Inputs, output: Path) -> tuple[Absorption, Path]:
    """What was done, and the folder with the result's model."""
    texts = work.texts(list(inputs.texts))
    edit = work.edit(texts)
    distilled = work.distil(texts, edit)
    comparisons = work.prove(distilled, texts)
    done = Absorption(
        output=output,
        inputs=replace(inputs, settings=work.settings, dtype=work.dtype),
        writers=edit.writers,
        layers=edit.layers,
        losses=read_losses(work.folder, STAGE),
        validation_losses=read_losses(work.folder, STAGE, "held_out"),
        comparisons=comparisons,
        seconds=work.seconds,
    )
    return done, distilled


def _write(done: Absorption, original: Path, distilled: Path, folder: Path, command: str) -> None:
    """The result: the model, and what lies beside the original's weights, its tokenizer and licence for example."""
    shutil.copytree(distilled, folder, dirs_exist_ok=True)
    beside = open_checkpoint(original)
    names = [name for name in beside.side_files() if name not in OWN_FILES and not (folder / name).exists()]
    copy_side_files(beside, names, folder)
    (folder / REPORT_NAME).write_text(done.as_json(), encoding="utf-8")
    (folder / CARD_NAME).write_text(absorption_card(done, original, command), encoding="utf-8")
    for path in folder.rglob("*"):
        sync(path)

"""A checkpoint with attention sinks in, one without them out; its steps are kept until the result is complete."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import GENERATION_CONFIG_NAME

from modeling_gated.checkpoints.checkpoint import open_checkpoint
from modeling_gated.checkpoints.config import stored_dtype
from modeling_gated.checkpoints.file_names import CARD_NAME, OWN_FILES
from modeling_gated.checkpoints.files import sha256, sync
from modeling_gated.checkpoints.loading import read_generation_config
from modeling_gated.checkpoints.output import check_output, clear_leftovers, replacing, scratch_directory
from modeling_gated.checkpoints.shards import copy_side_files
from modeling_gated.checkpoints.sources import find_source
from modeling_gated.checkpoints.tokenization import load_tokenizer
from modeling_gated.conversion.architecture import read_gated_config
from modeling_gated.conversion.command_line import command_line
from modeling_gated.errors import AbsorptionError, ConversionError
from modeling_gated.evaluation import EvaluationError
from modeling_gated.training.loop import read_losses

from .bfloat16_matmuls import has_bfloat16_matmuls
from .card import absorption_card
from .distillation.training import STAGE, accelerator_for
from .models import gated_original
from .result import REPORT_NAME, Absorption
from .run_identity import RunIdentity
from .settings import AbsorptionSettings
from .texts import Text, check_texts
from .work import Work, begin


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
        dtype: what to compute in, bfloat16 or float32; if not given, float32 on a CPU, where sampling, fitting
            and training multiply in bfloat16 if the CPU has instructions for it; elsewhere bfloat16 if the checkpoint
            is, else float32. The result has the checkpoint's, and what bfloat16 rounds stays rounded.
        device: if not given, the GPU if there is one.
        overwrite: replace `output` if it is an empty directory or a checkpoint.
        revision: the branch, tag or commit of a model on the hub.
        progress: show progress bars, on a terminal.

    Raises:
        AbsorptionError: if the checkpoint's gates are not 1 or its weights are quantized, a text is too short, or
            `OUTPUT.partial` is damaged or of another call; for another dtype; in a process in which accelerate was told
            to use another device or precision.
        ConversionError: if the checkpoint cannot be read, its weights are not finite, or the output not be written.
        TokenizerError: if its tokenizer cannot be loaded, fails, or gives ids that the model has no embeddings for.
        EvaluationError: if a text cannot be read.
    """
    settings = settings or AbsorptionSettings()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output, paths = Path(output).resolve(), [Path(path) for path in text]
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise AbsorptionError(f"dtype {dtype}: is neither bfloat16 nor float32")
    flags = {"text": paths} | {name: getattr(settings, name) for name in ("distill_tokens", "sample_tokens", "seed")}
    flags |= {"dtype": dtype, "revision": revision}
    origin = {"command": f"`{command_line('absorb', checkpoint, output, flags, overwrite)}`"}
    defaults = asdict(AbsorptionSettings())
    unflagged = {name: value for name, value in asdict(settings).items() if name not in flags}
    unsaid = [f"{name}={value}" for name, value in unflagged.items() if value != defaults[name]]
    if unsaid:
        origin["settings that it has no flags for"] = ", ".join(unsaid)
    source = find_source(os.fspath(checkpoint), revision)
    clear_leftovers(output)
    check_output(source.path, output, overwrite)
    check_texts(paths)
    accelerator_for(device)  # refuses at once what would end the run at its distillation
    folder = output.with_name(f"{output.name}.partial")
    try:
        # Part of the run's identity: what a GPU, or a CPU with matmuls in bfloat16, began, others do not finish.
        on_cpu = dtype is None and device.type == "cpu"
        dtype, bfloat16_matmuls = torch.float32 if on_cpu else dtype, on_cpu and has_bfloat16_matmuls()
        identity = RunIdentity(source, {path: sha256(path) for path in paths}, settings, dtype, bfloat16_matmuls)
        begin(folder, identity.as_settings())
        work, texts = _prepared(identity, folder, device, progress)
        done, distilled = _absorbed(work, texts, identity, output)
        with replacing(output, overwrite) as staging:
            _write(done, work.original, distilled, staging, origin)
        with scratch_directory(output) as scratch:  # under its name it is whole or not there
            folder.rename(scratch / folder.name)
    except OSError as error:
        raise AbsorptionError(f"{error.filename or output}: {error.strerror or error}") from error
    except SafetensorError as error:  # how saving says that the disk is full
        raise AbsorptionError(f"{output}: {error}") from error
    return done


def _prepared(identity: RunIdentity, folder: Path, device: torch.device, progress: bool) -> tuple[Work, list[Text]]:
    """The steps, of the original with gates that are 1, and their texts."""
    source = identity.source.path
    try:
        tokenizer = None
        if not identity.source.is_gguf:  # before anything is written
            directory = source if source.is_dir() else source.parent
            tokenizer, _ = load_tokenizer(directory), read_generation_config(directory)
        path = gated_original(identity.source, folder / "original", progress)
        if tokenizer is None:
            tokenizer = load_tokenizer(path)
            tokenizer.name_or_path = str(source)  # in errors
        original = open_checkpoint(path)
        limit = read_gated_config(original).max_position_embeddings
        lengths = {
            name: min(getattr(identity.settings, name), limit) for name in ("window_tokens", "long_window_tokens")
        }
        settings = replace(identity.settings, **lengths)
        # Gradients of float16 would vanish.
        is_bfloat16 = stored_dtype(original) == torch.bfloat16
        dtype = identity.dtype or (torch.bfloat16 if is_bfloat16 else torch.float32)
        work = Work(folder, path, tokenizer, settings, dtype, device, progress, identity.bfloat16_matmuls, source)
        return work, work.texts(list(identity.texts))
    except (AbsorptionError, ConversionError, EvaluationError):
        if not (folder / "sampled.json").is_file():  # what is refused leaves nothing behind
            shutil.rmtree(folder)
        raise


def _absorbed(work: Work, texts: list[Text], identity: RunIdentity, output: Path) -> tuple[Absorption, Path]:
    """What was done, and the folder with the result's model."""
    edit = work.edit(texts)
    distilled = work.distil(texts, edit)
    comparisons, losses = work.prove(distilled, texts), read_losses(work.folder, STAGE)
    done = Absorption(
        output=output,
        identity=replace(identity, settings=work.settings, dtype=work.dtype),
        writers=edit.writers,
        layers=edit.layers,
        losses=losses,
        distilled_tokens=work.tokens(texts, len(losses)),
        validation_losses=read_losses(work.folder, STAGE, "held_out"),
        comparisons=comparisons,
        seconds=work.seconds,
        notes=tuple(work.notes()),
    )
    return done, distilled


def _write(done: Absorption, original: Path, distilled: Path, folder: Path, origin: dict[str, str]) -> None:
    """The result: the model, and what lies beside the original's weights, its tokenizer and licence for example."""
    shutil.copytree(distilled, folder, dirs_exist_ok=True)
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)  # the original's, if it has one, is a side file
    beside = open_checkpoint(original)
    copy_side_files(beside, [name for name in beside.side_files() if name not in OWN_FILES], folder)
    (folder / REPORT_NAME).write_text(done.as_json(), encoding="utf-8")
    (folder / CARD_NAME).write_text(absorption_card(done, original, origin), encoding="utf-8")
    for path in folder.rglob("*"):
        sync(path)

"""Conversion of a checkpoint with attention sinks into a gated checkpoint without sinks, in steps that can resume."""

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
    Write a gated checkpoint with nearly the predictions of `checkpoint`, without attention sinks and massive
    activations.

    Results of the slow steps are kept in `OUTPUT.partial`. After an interruption, the same call resumes from there.
    The result gets its name when it is complete, and `OUTPUT.partial` is then removed. The model card and
    `absorption.json` report the measured differences.

    Args:
        checkpoint: any checkpoint that can be converted, or a gated checkpoint whose gates are 1, as conversion writes.
        output: directory to create.
        text: UTF-8 files to distil on, in addition to text that the source model samples. They replace the default
            prose, documentation and code. The last quarter of each file is held out. The twentieth before the last
            quarter is validation text for early stopping.
        settings: settings of the edit, the distillation and the comparison.
        dtype: dtype to compute in, bfloat16 or float32. The default on a CPU is float32; sampling, fitting and training
            then use bfloat16 matmuls if the CPU has instructions for them. The default elsewhere is bfloat16 for a
            bfloat16 checkpoint, otherwise float32. The result has the checkpoint's dtype. Values that bfloat16
            rounds stay rounded.
        device: device to compute on; the GPU by default if there is one, otherwise the CPU.
        overwrite: replace `output` if it is an empty directory or a checkpoint.
        revision: branch, tag or commit of a model on the hub.
        progress: show progress bars, on a terminal.

    Returns:
        The edits, losses, times and comparisons of the run.

    Raises:
        AbsorptionError: if the checkpoint's gates are not 1, its weights are quantized, or a text is too short; if
            `OUTPUT.partial` is damaged or from a call with other settings; if `dtype` is another dtype; or if
            accelerate uses another device or precision in this process.
        ConversionError: if the checkpoint cannot be read, its weights are not finite, or the output cannot be written.
        TokenizerError: if the tokenizer cannot be loaded, fails, or gives ids that the model has no embeddings for.
        EvaluationError: if a text cannot be read.
    """
    settings = settings or AbsorptionSettings()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output, paths = Path(output).resolve(), [Path(path) for path in text]
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise AbsorptionError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    flags = {"text": paths} | {name: getattr(settings, name) for name in ("distill_tokens", "sample_tokens", "seed")}
    flags |= {"dtype": dtype, "revision": revision}
    origin = {"command": f"`{command_line('absorb', checkpoint, output, flags, overwrite)}`"}
    defaults = asdict(AbsorptionSettings())
    unflagged = {name: value for name, value in asdict(settings).items() if name not in flags}
    unsaid = [f"{name}={value}" for name, value in unflagged.items() if value != defaults[name]]
    if unsaid:
        origin["settings without a flag"] = ", ".join(unsaid)
    source = find_source(os.fspath(checkpoint), revision)
    clear_leftovers(output)
    check_output(source.path, output, overwrite)
    check_texts(paths)
    accelerator_for(device)  # fail early: distillation would raise the same error
    folder = output.with_name(f"{output.name}.partial")
    try:
        # Part of the run's identity: another kind of device or of matmuls must not resume a run.
        on_cpu = dtype is None and device.type == "cpu"
        dtype, bfloat16_matmuls = torch.float32 if on_cpu else dtype, on_cpu and has_bfloat16_matmuls()
        identity = RunIdentity(source, {path: sha256(path) for path in paths}, settings, dtype, bfloat16_matmuls)
        begin(folder, identity.as_settings())
        work, texts = _prepared(identity, folder, device, progress)
        done, distilled = _absorbed(work, texts, identity, output)
        with replacing(output, overwrite) as staging:
            _write(done, work.original, distilled, staging, origin)
        with scratch_directory(output) as scratch:  # rename first: OUTPUT.partial is never half deleted
            folder.rename(scratch / folder.name)
    except OSError as error:
        raise AbsorptionError(f"{error.filename or output}: {error.strerror or error}") from error
    except SafetensorError as error:  # raised by saving if the disk is full
        raise AbsorptionError(f"{output}: {error}") from error
    return done


def _prepared(identity: RunIdentity, folder: Path, device: torch.device, progress: bool) -> tuple[Work, list[Text]]:
    """Return the steps, for the source model with gates that are 1, and the texts for them."""
    source = identity.source.path
    try:
        tokenizer = None
        if not identity.source.is_gguf:  # check before writing
            directory = source if source.is_dir() else source.parent
            tokenizer, _ = load_tokenizer(directory), read_generation_config(directory)
        path = gated_original(identity.source, folder / "original", progress)
        if tokenizer is None:
            tokenizer = load_tokenizer(path)
            tokenizer.name_or_path = str(source)  # so that errors name the GGUF file
        original = open_checkpoint(path)
        limit = read_gated_config(original).max_position_embeddings
        lengths = {
            name: min(getattr(identity.settings, name), limit) for name in ("window_tokens", "long_window_tokens")
        }
        settings = replace(identity.settings, **lengths)
        # bfloat16 or float32, since float16 gradients would underflow.
        is_bfloat16 = stored_dtype(original) == torch.bfloat16
        dtype = identity.dtype or (torch.bfloat16 if is_bfloat16 else torch.float32)
        work = Work(folder, path, tokenizer, settings, dtype, device, progress, identity.bfloat16_matmuls, source)
        return work, work.texts(list(identity.texts))
    except (AbsorptionError, ConversionError, EvaluationError):
        if not (folder / "sampled.json").is_file():  # a refused checkpoint leaves no files
            shutil.rmtree(folder)
        raise


def _absorbed(work: Work, texts: list[Text], identity: RunIdentity, output: Path) -> tuple[Absorption, Path]:
    """Run the steps; return the record of the run and the folder of the distilled model."""
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
    """Write the result: model, report, card, and the source's side files, such as its tokenizer and license."""
    shutil.copytree(distilled, folder, dirs_exist_ok=True)
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)  # the source's file, if any, is copied as a side file
    beside = open_checkpoint(original)
    copy_side_files(beside, [name for name in beside.side_files() if name not in OWN_FILES], folder)
    (folder / REPORT_NAME).write_text(done.as_json(), encoding="utf-8")
    (folder / CARD_NAME).write_text(absorption_card(done, original, origin), encoding="utf-8")
    for path in folder.rglob("*"):
        sync(path)

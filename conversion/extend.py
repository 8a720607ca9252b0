"""A checkpoint for longer inputs: the same weights and files, with another RoPE in the config."""

import json
import os
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_gated.checkpoints.checkpoint import Checkpoint, open_checkpoint, shorter_tokenizer
from modeling_gated.checkpoints.config import naming, read_config
from modeling_gated.checkpoints.file_names import CARD_NAME, MANIFEST_NAME
from modeling_gated.checkpoints.files import errors_naming
from modeling_gated.checkpoints.output import check_output, clear_leftovers, replacing
from modeling_gated.checkpoints.placement import check_space
from modeling_gated.checkpoints.records import FileRecord, check_stamp
from modeling_gated.checkpoints.shards import copy_side_files, record_others, write_shards
from modeling_gated.checkpoints.sources import find_source
from modeling_gated.configuration import ContextExtension, describe_context, extend_context
from modeling_gated.defaults import PLACE, Place
from modeling_gated.errors import ConversionError

from .architecture import check_index_of_any
from .card import with_context
from .command_line import command_line, context_flags
from .manifest import Manifest, as_bytes, as_text, read_manifest
from .trial import check_configs_run


_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")
_WHY = f"(if that is meant, as after training, delete its {MANIFEST_NAME}: there is no way back to the source then)"


@dataclass(frozen=True)
class ExtendedCheckpoint:
    """
    What `extend_checkpoint` made: the directory, the extension, what it was and is in words, the bytes of weights
    that were written and those shared with the source, the `model_max_length` of its tokenizer if that is less than
    the new length, the seconds it took, notes on harmless disagreements between the source's index and its shards, and
    the sizes in bytes of the source's files that did not come along.
    """

    output: Path
    extension: ContextExtension
    before: str
    after: str
    written_bytes: int
    shared_bytes: int
    tokenizer_length: int | None
    seconds: float
    index_notes: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


def extend_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    context: Mapping[str, Any],
    place: Place = PLACE,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> ExtendedCheckpoint:
    """
    Write a checkpoint that differs in `rope_parameters` and `max_position_embeddings`, by `extend_context`.

    `rope_parameters` takes the place of `rope_scaling` and `rope_theta`, the spelling before Transformers 5. All other
    files are the source's, byte for byte; of a checkpoint that `convert_checkpoint` made, manifest and model card
    tell of the extension, so that it can still be verified and ungated.

    Args:
        checkpoint: a checkpoint in safetensors, gated or of a family that can be: a directory, a file, a hub id.
        output: the directory to make.
        context: arguments of `extend_context`, such as `{"length": 131072, "method": "yarn"}`.
        place: how the shards get there, as in `convert_checkpoint`.
        overwrite: replace `output` if it is an empty directory or a checkpoint.
        revision: the branch, tag or commit of a model on the hub.
        progress: show a progress bar, on a terminal.

    Raises:
        ConversionError: if the context cannot be extended so, the checkpoint not be read or the output not be written.
            Nothing is left behind.
    """
    started = time.perf_counter()
    flags = context_flags(context) | {"place": place, "revision": revision}
    command = command_line("extend", checkpoint, output, flags, overwrite)
    with errors_naming(output):
        output = Path(output).resolve()
        clear_leftovers(output)
        source = find_source(os.fspath(checkpoint), revision)
        check_output(source.path, output, overwrite)
        if source.is_gguf:
            raise ConversionError(f"{source.path}: a GGUF file; gated-llama convert takes the same options for it")
        source_checkpoint = open_checkpoint(source.path)
        config = read_config(source_checkpoint)
        before = deepcopy(config)
        with naming(source_checkpoint.config_path):
            extension = extend_context(config, **context)
        new_config = _new_config(source_checkpoint, config)
        index_notes = check_index_of_any(source_checkpoint, config)
        left_out = source.left_out | source_checkpoint.left_out()
        manifest = read_manifest(source_checkpoint.directory)
        with replacing(output, overwrite) as staging:
            records, shared = _write(
                source_checkpoint, new_config, describe_context(config), staging, output, place, progress
            )
            if manifest is not None:
                _update_manifest(manifest, source_checkpoint, records, command, context, left_out).write(staging)
    total = sum(shard.file_bytes for shard in source_checkpoint.shards)
    return ExtendedCheckpoint(
        output=output,
        extension=extension,
        before=describe_context(before),
        after=describe_context(config),
        written_bytes=total - shared,
        shared_bytes=shared,
        tokenizer_length=shorter_tokenizer(output, extension.max_position_embeddings),
        seconds=time.perf_counter() - started,
        index_notes=index_notes,
        left_out=left_out,
    )


def _new_config(checkpoint: Checkpoint, config: PreTrainedConfig) -> str:
    """Return the text of config.json with the length and RoPE of the config, and nothing else changed."""
    raw = {name: value for name, value in checkpoint.raw_config.items() if name not in _ROPE_FIELDS}
    raw |= {"rope_parameters": config.rope_parameters, "max_position_embeddings": config.max_position_embeddings}
    if "original_max_position_embeddings" in raw:
        raw["original_max_position_embeddings"] = config.original_max_position_embeddings
    changed = replace(checkpoint, raw_config=raw)
    read = read_config(changed)
    if (read.rope_parameters, read.max_position_embeddings) != (config.rope_parameters, config.max_position_embeddings):
        raise ConversionError(
            f"{checkpoint.config_path}: {config.rope_parameters} would be read as {read.rope_parameters}"
        )
    check_configs_run(changed, lambda small: [read_config(small)])
    return json.dumps(raw, indent=2, sort_keys=True) + "\n"


def _write(
    checkpoint: Checkpoint, config: str, described: str, staging: Path, output: Path, place: Place, progress: bool
) -> tuple[dict[str, FileRecord], int]:
    """Write all files but the manifest; return their records, and the bytes shared with the source."""
    side_files = [name for name in checkpoint.side_files() if name not in (MANIFEST_NAME, CONFIG_NAME)]
    check_space(
        sum(os.path.getsize(checkpoint.directory / name) for name in side_files),
        checkpoint.shards,
        staging,
        output,
        place,
    )
    placed = {shard.name if checkpoint.has_index else SAFE_WEIGHTS_NAME: shard for shard in checkpoint.shards}
    records, shared = write_shards(placed, {}, staging, place, progress)
    if checkpoint.has_index:
        side_files.append(SAFE_WEIGHTS_INDEX_NAME)
    copy_side_files(checkpoint, side_files, staging)
    (staging / CONFIG_NAME).write_text(config)
    card = staging / CARD_NAME
    if card.is_file():
        card.write_bytes(as_bytes(with_context(as_text(card.read_bytes()), described)))
    return records | record_others(staging, records, ()), shared


def _update_manifest(
    manifest: Manifest,
    checkpoint: Checkpoint,
    records: Mapping[str, FileRecord],
    command: str,
    context: Mapping[str, Any],
    left_out: dict[str, int],
) -> Manifest:
    """Return the manifest of the result, with the first source's records of files that have not changed."""
    files = {}
    for name, file_record in records.items():
        known = manifest.files.get(name)
        files[name] = file_record
        if known is None or name in (CONFIG_NAME, CARD_NAME):
            continue
        check_stamp(checkpoint.directory / name, known)
        if known.sha256 is not None and file_record.sha256 not in (None, known.sha256):
            raise ConversionError(f"{checkpoint.directory / name}: is not what conversion wrote {_WHY}")
        files[name] = replace(file_record, sha256=file_record.sha256 or known.sha256, source=known.source)
    expected = [name for name, known in manifest.files.items() if known.source is not None and name not in left_out]
    if gone := [name for name in expected if name not in files]:
        raise ConversionError(
            f"{checkpoint.directory / gone[0]}: is missing, or no part of the checkpoint any more {_WHY}"
        )
    return replace(
        manifest,
        command=f"{manifest.command} && {command}",
        files=files,
        context=[*manifest.context, dict(context)],
        verification=None,
        left_out=manifest.left_out | left_out,
    )

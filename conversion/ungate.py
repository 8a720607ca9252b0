"""The way back: from a converted checkpoint to the bytes of its source."""

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from modeling_gated.checkpoints.checkpoint import Checkpoint, open_checkpoint
from modeling_gated.checkpoints.file_names import MANIFEST_NAME
from modeling_gated.checkpoints.files import errors_naming, resolve, sha256, sync
from modeling_gated.checkpoints.output import check_output, clear_leftovers, replacing
from modeling_gated.checkpoints.placement import check_space, place_file
from modeling_gated.checkpoints.records import check_stamp
from modeling_gated.checkpoints.sources import find_source
from modeling_gated.defaults import PLACE, Place
from modeling_gated.errors import ConversionError

from .architecture import read_gated_config
from .gates import changed_gate_layers, ranges
from .manifest import Manifest, as_bytes, read_manifest


@dataclass(frozen=True)
class Restoration:
    """
    Result of `ungate_checkpoint`: the directory, the names of its files, and the sizes in bytes of files of the source
    that conversion left out, which cannot be restored.
    """

    output: Path
    files: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)


def ungate_checkpoint(
    gated: str | os.PathLike,
    output: str | os.PathLike,
    *,
    place: Place = PLACE,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> Restoration:
    """
    Restore the files that a checkpoint was converted from, byte for byte, if its gates are still what conversion
    wrote. Of a GGUF source that is the dequantized checkpoint. Files that conversion left out, such as weights in other
    forms, are not restored; the manifest lists them.

    Each restored file is compared with the SHA-256 that conversion recorded; a shard that conversion hard-linked has
    none unless `gated-llama verify` recorded it since, and is compared by its size and time stamp.

    Args:
        gated: the converted checkpoint, a directory or a model on the hub.
        output: the directory to make.
        place: how the shards get there, as in `convert_checkpoint`.
        overwrite: replace `output` if it is an empty directory or a checkpoint.
        revision: the branch, tag or commit of a model on the hub.
        progress: show a progress bar, on a terminal.

    Raises:
        ConversionError: if a gate or a file was changed, or the checkpoint does not say what it was made from.
            Nothing is left behind.
    """
    with errors_naming(output):
        output = Path(output).resolve()
        directory = find_source(os.fspath(gated), revision).path
        clear_leftovers(output)
        check_output(directory, output, overwrite)
        checkpoint = open_checkpoint(directory)
        config = read_gated_config(checkpoint)
        manifest = read_manifest(checkpoint.directory)
        if manifest is not None and manifest.source.get("format") == "fused":
            raise ConversionError(f"{directory}: its gates come from the source, so there is no ungated source")
        if changed := changed_gate_layers(checkpoint, config):
            raise ConversionError(
                f"{directory}: the gates of layers {ranges(changed)} are not what conversion wrote, so the source "
                "would be another function"
            )
        if manifest is None:
            raise ConversionError(
                f"{directory}: has no {MANIFEST_NAME}, which conversion writes and a later save does not; ungate the "
                "directory that gated-llama convert made"
            )
        return _restore(manifest, checkpoint, output, overwrite, place, progress)


def _restore(
    manifest: Manifest, checkpoint: Checkpoint, output: Path, overwrite: bool, place: Place, progress: bool
) -> Restoration:
    directory = checkpoint.directory
    files = {name: file_record for name, file_record in manifest.files.items() if file_record.source is not None}
    targets = [
        _relative(directory, name)
        for name in (*(str(file_record.source) for file_record in files.values()), *manifest.replaced)
    ]
    if len(set(targets)) != len(targets) or any(parent in targets for path in targets for parent in path.parents):
        raise ConversionError(f"{directory / MANIFEST_NAME}: two files come from one")
    total = 2 * sum(file_record.size for file_record in files.values())
    with replacing(output, overwrite) as staging:
        check_space(0, checkpoint.shards, staging, output, place)
        with tqdm(total=total, desc="Restoring", unit="B", unit_scale=True, disable=None if progress else True) as bar:
            for name, file_record in files.items():
                target = staging / str(file_record.source)
                target.parent.mkdir(parents=True, exist_ok=True)
                is_weights = target.suffix == ".safetensors"
                path = resolve(directory, name)
                check_stamp(path, file_record)
                place_file(path, target, place if is_weights else "copy", bar.update)
                if file_record.sha256 is not None and sha256(target, bar.update) != file_record.sha256:
                    raise ConversionError(f"{directory / name}: is not what conversion wrote (another SHA-256)")
                if place != "link" or not is_weights:
                    sync(target)
        for name, text in manifest.replaced.items():
            (staging / name).write_bytes(as_bytes(text))
            sync(staging / name)
    return Restoration(output, tuple(sorted(str(target) for target in targets)), manifest.left_out)


def _relative(directory: Path, name: str) -> PurePosixPath:
    """Return a file's name in the manifest as a relative path that stays inside the directory."""
    path = PurePosixPath(name)
    try:
        is_name = 0 < max((len(os.fsencode(piece)) for piece in path.parts), default=0) <= 255 and "\0" not in name
    except UnicodeEncodeError:
        is_name = False
    if path.is_absolute() or ".." in path.parts or not is_name:
        raise ConversionError(f"{directory / MANIFEST_NAME}: {name!r} is not a file of a checkpoint")
    return path

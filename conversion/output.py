"""The directory of a result: what may be replaced, and how a new one appears only when it is complete."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from modeling_gated.configuration import SOURCE_FAMILIES, GatedLlamaConfig

from .errors import ConversionError


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raise ConversionError if `output`, a resolved path, must not be made."""
    source = source.resolve()
    if source == output or source in output.parents or output in source.parents:
        raise ConversionError(f"{output}: the output and the source {source} must not contain each other")
    if not output.exists():
        return
    if not overwrite:
        raise ConversionError(f"{output}: already exists; --overwrite replaces it")
    if not output.is_dir() or (any(output.iterdir()) and not _is_checkpoint(output)):
        raise ConversionError(f"{output}: neither a checkpoint nor an empty directory, so it is not overwritten")


def _is_checkpoint(directory: Path) -> bool:
    try:
        model_type = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return model_type in (GatedLlamaConfig.model_type, *SOURCE_FAMILIES)


@contextmanager
def scratch_directory(output: Path) -> Iterator[Path]:
    """A new hidden directory beside `output`, removed at the end; on failure, parents made for it are removed too."""
    missing = [folder for folder in output.parents if not folder.exists()]
    # A name of its own, which no earlier run that was killed can have left behind.
    scratch = output.with_name(f".{output.name}.{uuid4().hex}")
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise ConversionError(f"{output}: cannot be made: {error.strerror}") from error
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise
    shutil.rmtree(scratch)


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new directory that takes the name `output` on success. On failure it is removed, and what was there stays."""
    with scratch_directory(output) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        try:
            if output.exists():
                output.rename(old)
            new.rename(output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise

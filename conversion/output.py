"""The directory of a result: what may be replaced, and how a new one appears only when it is complete."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
def replacing(output: Path) -> Iterator[Path]:
    """A new directory beside `output` that takes its name on success, and is removed on failure."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    staging.mkdir()
    try:
        yield staging
        if output.exists():
            replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
            output.rename(replaced)
            staging.rename(output)
            shutil.rmtree(replaced)
        else:
            staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise

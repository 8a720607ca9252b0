"""Replacing the source files that a checkpoint carries by those of this version."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.utils import CONFIG_NAME

from modeling_gated.configuration import GatedLlamaConfig, carried_source_files

from .errors import ConversionError
from .files import MAX_CONFIG_BYTES, errors_naming, read_bytes, read_json, resolve
from .manifest import read_manifest, record, replace_file
from .sources import find_source


@dataclass(frozen=True)
class RefreshedCode:
    """The checkpoint's directory, and the names of the source files that were replaced: none if all were current."""

    directory: Path
    files: tuple[str, ...]


def refresh_code(checkpoint: str | os.PathLike) -> RefreshedCode:
    """
    Replace the source files in a checkpoint, which `trust_remote_code=True` runs, by those of this version.

    Each file is replaced in one step. If a later one cannot be written, the earlier ones get their old content back.
    The manifest, if there is one, gets the new hashes, and no verification any more, since that was of the old code.
    No other file is written to.

    Args:
        checkpoint: a directory with a gated checkpoint that was saved with its code.

    Raises:
        ConversionError: if there is no such checkpoint, or it lies in the hub's cache.
    """
    with errors_naming(checkpoint):
        directory = Path(checkpoint).absolute()
        if not directory.is_dir():
            raise ConversionError(
                f"{checkpoint}: no such directory; of a model on the hub, download a copy: hf download MODEL "
                "--local-dir DIRECTORY"
            )
        if find_source(os.fspath(directory)).repo_id is not None:
            raise ConversionError(
                f"{directory}: lies in the hub's cache, which is shared; download a copy: hf download MODEL "
                "--local-dir DIRECTORY"
            )
        _check_carries_code(directory)
        manifest = read_manifest(directory)
        # The configuration first: the old model file runs with the new one's, but not the other way round.
        new = {name: source.encode() for name, source in carried_source_files()}
        old = {name: _content(directory, name) for name in new}
        changed = tuple(name for name in new if new[name] != old[name])
        with _undone_on_failure(directory, old):
            for name in changed:
                replace_file(directory / name, new[name])
            if manifest is not None and changed:
                files = manifest.files | {name: record(directory / name) for name in changed}
                replace(manifest, files=files, verification=None).write(directory)
        return RefreshedCode(directory, changed)


def outdated_code(directory: Path) -> tuple[str, ...]:
    """Return the names of the source files in a checkpoint that are not this version's."""
    return tuple(
        name
        for name, source in carried_source_files()
        if (content := _content(directory, name)) is not None and content != source.encode()
    )


def _content(directory: Path, name: str) -> bytes | None:
    return read_bytes(resolve(directory, name)) if os.path.lexists(directory / name) else None


def _check_carries_code(directory: Path) -> None:
    config = read_json(resolve(directory, CONFIG_NAME), MAX_CONFIG_BYTES)
    if (model_type := config.get("model_type")) != GatedLlamaConfig.model_type:
        raise ConversionError(f"{directory / CONFIG_NAME}: model_type={model_type!r} is not gated_llama")
    auto_map = config.get("auto_map")
    entry = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if not isinstance(entry, str) or not entry.startswith("modeling_gated_llama."):
        raise ConversionError(
            f"{directory / CONFIG_NAME}: auto_map must name modeling_gated_llama, got {auto_map!r}; a checkpoint that "
            "carries no code is saved with it by GatedLlamaConfig.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
        )


@contextmanager
def _undone_on_failure(directory: Path, old: dict[str, bytes | None]) -> Iterator[None]:
    """Give files their old content back, or remove those that were not there, if the `with` block fails."""
    try:
        yield
    except BaseException:
        for name, content in old.items():
            if content is None:
                (directory / name).unlink(missing_ok=True)
            elif (directory / name).read_bytes() != content:
                replace_file(directory / name, content)
        raise

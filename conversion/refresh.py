"""Replacing the source files that a checkpoint carries by those of this version."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from modeling_gated.checkpoints.file_names import MANIFEST_NAME
from modeling_gated.checkpoints.files import (
    MAX_CONFIG_BYTES,
    errors_naming,
    read_bytes,
    read_json,
    resolve,
    sha256,
    sha256_of,
)
from modeling_gated.checkpoints.records import FileRecord
from modeling_gated.checkpoints.replacement import replace_files
from modeling_gated.checkpoints.sources import find_source
from modeling_gated.configuration import GatedLlamaConfig, carried_source_files
from modeling_gated.errors import ConversionError

from .manifest import Manifest, as_text, read_manifest


_DOWNLOAD = "download a copy of a model on the hub: hf download MODEL --local-dir DIRECTORY"


@dataclass(frozen=True)
class RefreshedCode:
    """
    Result of `refresh_code`: the checkpoint's directory and the names of the source files that were replaced, none if
    all were current. `had_verification` says whether the manifest had a verification, of the old code.
    """

    directory: Path
    files: tuple[str, ...]
    had_verification: bool


def refresh_code(checkpoint: str | os.PathLike) -> RefreshedCode:
    """
    Replace the source files in a checkpoint, which `trust_remote_code=True` runs, by those of this version.

    Missing files are added: earlier versions wrote all code into two files. Each file is replaced in one step; if one
    cannot be replaced, all get their old content back. The manifest, if there is one, gets the new hashes, and no
    verification any more, since that was of the old code. No other file is written to.

    Args:
        checkpoint: a directory with a gated checkpoint that was saved with its code.

    Raises:
        ConversionError: if there is no such checkpoint, or it lies in the hub's cache.
    """
    with errors_naming(checkpoint):
        directory = directory_to_change(checkpoint)
        _check_carries_code(directory)
        manifest = read_manifest(directory)
        # In this order, the model last: each file imports those before it.
        new = {name: source.encode() for name, source in carried_source_files()}
        changed = tuple(name for name in new if new[name] != file_content(directory, name))
        contents = {file_to_replace(directory, name): new[name] for name in changed}
        had_verification = bool(changed) and manifest is not None and manifest.verification is not None
        if manifest is not None:
            updated = with_new_files(manifest, directory, new)
            if updated.files != manifest.files:  # also where somebody else has replaced the code
                contents[file_to_replace(directory, MANIFEST_NAME)] = updated.content()
        replace_files(contents)
        return RefreshedCode(directory, changed, had_verification)


def outdated_code(directory: Path) -> tuple[str, ...]:
    """Return the source files that a checkpoint's config names and that are not this version's, or missing."""
    if not _names_carried_code(read_json(resolve(directory, CONFIG_NAME), MAX_CONFIG_BYTES)):
        return ()
    return tuple(name for name, source in carried_source_files() if file_content(directory, name) != source.encode())


def directory_to_change(checkpoint: str | os.PathLike) -> Path:
    """
    Return the directory of a checkpoint whose files may be replaced.

    Raises:
        ConversionError: if there is no such directory, or it lies in the hub's cache, which other programs share.
    """
    directory = Path(checkpoint).absolute()
    if not directory.is_dir():
        raise ConversionError(f"{checkpoint}: no such directory; {_DOWNLOAD}")
    if find_source(os.fspath(directory)).repo_id is not None:
        raise ConversionError(f"{directory}: lies in the hub's cache, which is shared; {_DOWNLOAD}")
    return directory


def file_content(directory: Path, name: str) -> bytes | None:
    """Return the content of a checkpoint's file, None if there is no such file."""
    return read_bytes(resolve(directory, name)) if os.path.lexists(directory / name) else None


def file_to_replace(directory: Path, name: str) -> Path:
    """Return the file to replace: where a link leads to, so that it stays a link."""
    return resolve(directory, name) if os.path.lexists(directory / name) else directory / name


def with_new_files(manifest: Manifest, directory: Path, contents: dict[str, bytes]) -> Manifest:
    """
    Return a manifest with records of files that replace a checkpoint's, and without its verification.

    It keeps the content of files that are the source's, for `ungate`.
    """
    files, replaced = dict(manifest.files), dict(manifest.replaced)
    for name, content in contents.items():
        record = files.get(name)
        if record is not None and record.source is not None:
            if record.sha256 != sha256(resolve(directory, name)):
                continue  # somebody changed the file: `ungate` says so
            replaced[name] = as_text(read_bytes(resolve(directory, name)))
        files[name] = FileRecord(len(content), sha256_of([content]))
    return replace(manifest, files=files, replaced=replaced, verification=None)


def _check_carries_code(directory: Path) -> None:
    config = read_json(resolve(directory, CONFIG_NAME), MAX_CONFIG_BYTES)
    if (model_type := config.get("model_type")) != GatedLlamaConfig.model_type:
        raise ConversionError(f"{directory / CONFIG_NAME}: model_type must be gated_llama, got {model_type!r}")
    if not _names_carried_code(config):
        raise ConversionError(
            f"{directory / CONFIG_NAME}: auto_map must name modeling_gated_llama, got {config.get('auto_map')!r}; save "
            "the code with GatedLlamaConfig.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
        )


def _names_carried_code(config: dict[str, Any]) -> bool:
    """Return whether a config names a class in the checkpoint's own code."""
    auto_map = config.get("auto_map")
    entry = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    return isinstance(entry, str) and entry.startswith("modeling_gated_llama.")

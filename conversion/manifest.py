"""
`gated_llama_manifest.json`: where a converted checkpoint comes from, the SHA-256 of each of its files, and what of the
source its own files took the place of, so that the source can be given back.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .errors import ConversionError
from .files import read_json, resolve, sha256, sync
from .plan import MANIFEST_NAME


_FORMAT = 1


@strict
@dataclass
class FileRecord:
    """
    A file of a converted checkpoint.

    `sha256` is None for a hard-linked shard, which conversion does not read; then `mtime_ns`, the file's time stamp,
    says whether it was written to since. `source` is the source's name of the file, if it came from there.
    """

    size: int
    sha256: str | None
    mtime_ns: int | None = None
    source: str | None = None


@strict
@dataclass
class Manifest:
    """
    The content of `gated_llama_manifest.json`.

    `source` says where the base tensors come from: `name`, `repo_id`, `revision`, `format` (safetensors, gguf or
    fused) and for a GGUF file its `sha256`. `gates` holds the gate's fields of the config. `files` maps names to
    records, `replaced` the names of the source's files that own ones replaced to their text. `context` holds the
    arguments of `extend_context`, for each time that it was applied to the source's config. `verification` is what
    `gated-llama verify` found last, if it ran. `left_out` holds the sizes in bytes of the source's files that did not
    come along, by their paths in the source.
    """

    command: str
    source: dict[str, Any]
    gates: dict[str, Any]
    files: dict[str, FileRecord]
    replaced: dict[str, str]
    context: list[dict[str, Any]]
    verification: dict[str, Any] | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write the manifest into a directory, in one step."""
        replace_file(directory / MANIFEST_NAME, self.content())

    def content(self) -> bytes:
        """Return the content of the file."""
        files = {
            name: {key: value for key, value in asdict(record).items() if value is not None or key == "sha256"}
            for name, record in sorted(self.files.items())
        }
        content = {"format": _FORMAT, "created_by": f"modeling-gated {version('modeling-gated')}"}
        content |= {name: value for name, value in vars(self).items() if name != "files"} | {"files": files}
        return (json.dumps(content, indent=2) + "\n").encode()


def read_manifest(directory: Path) -> Manifest | None:
    """
    The manifest of a directory; None if it has none.

    Raises:
        ConversionError: if it is damaged.
    """
    path = directory / MANIFEST_NAME
    if not os.path.lexists(path):
        return None
    content = read_json(resolve(directory, MANIFEST_NAME))
    if content.get("format") != _FORMAT:
        raise ConversionError(f"{path}: format {content.get('format')!r} is not {_FORMAT}")
    try:
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        fields = {name: content[name] for name in ("command", "source", "gates", "replaced", "verification")}
        fields |= {"context": content.get("context", []), "left_out": content.get("left_out", {})}
        return Manifest(files=files, **fields)
    except (AttributeError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"{path}: not a manifest of gated-llama: {error}") from None


def as_text(content: bytes) -> str:
    """Any bytes as a JSON string, from which `as_bytes` makes them again."""
    return content.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The bytes from which `as_text` made a string."""
    return text.encode("utf-8", "surrogateescape")


def record(path: Path, source: str | None = None) -> FileRecord:
    """The record of a file, which is read for its hash."""
    return FileRecord(path.stat().st_size, sha256(path), source=source)


def check_stamp(path: Path, found: FileRecord) -> None:
    """Raise ConversionError if a file's size, or a hard-linked one's time stamp, is not the recorded one."""
    status = path.stat()
    if status.st_size != found.size:
        raise ConversionError(f"{path}: is not what conversion wrote ({status.st_size} bytes, not {found.size})")
    if found.sha256 is None and status.st_mtime_ns != found.mtime_ns:
        raise ConversionError(
            f"{path}: was hard-linked, not hashed, and has another time stamp since; gated-llama verify, with the "
            "source, tells whether its content is the same"
        )


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content in one step: whoever opens it finds the old or the new."""
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """
    Give files new content, each in one step, in the order of `contents`; if that fails, the old content is put back.

    All that takes room on the disk is done before the first file changes. Old content that cannot be put back stays
    beside its file under a hidden name.
    """
    new, old, replaced = {}, {}, []
    try:
        for path, content in contents.items():
            new[path] = _hidden(path)
            new[path].write_bytes(content)
            if path.exists():
                shutil.copymode(path, new[path])
                if len(contents) > 1:
                    old[path] = _hidden(path)
                    shutil.copy2(path, old[path])
            sync(new[path])
        for path in contents:
            replaced.append(path)  # first: an interrupt may come right after the replacement
            os.replace(new[path], path)
    except BaseException:
        for path in reversed(replaced):
            with suppress(OSError):
                if path in old:
                    os.replace(old[path], path)
                elif len(contents) > 1:
                    path.unlink(missing_ok=True)
        for path in old.keys() - set(replaced):
            old[path].unlink(missing_ok=True)
        raise
    else:
        for path in old.values():
            path.unlink(missing_ok=True)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    """Return a new hidden name beside a file."""
    return path.with_name(f".{path.name}.{uuid4().hex}")

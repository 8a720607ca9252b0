"""
`gated_llama_manifest.json`: where a converted checkpoint comes from, the SHA-256 of each of its files, and what of the
source its own files took the place of, so that the source can be given back.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from modeling_gated.checkpoints.file_names import MANIFEST_NAME
from modeling_gated.checkpoints.files import read_json, resolve
from modeling_gated.checkpoints.records import FileRecord
from modeling_gated.checkpoints.replacement import replace_file
from modeling_gated.errors import ConversionError


_FORMAT = 1


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
    Return the manifest of a directory; None if it has none.

    Raises:
        ConversionError: if it is damaged.
    """
    path = directory / MANIFEST_NAME
    if not os.path.lexists(path):
        return None
    content = read_json(resolve(directory, MANIFEST_NAME))
    if content.get("format") != _FORMAT:
        raise ConversionError(f"{path}: format must be {_FORMAT}, got {content.get('format')!r}")
    try:
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        fields = {name: content[name] for name in ("command", "source", "gates", "replaced", "verification")}
        fields |= {"context": content.get("context", []), "left_out": content.get("left_out", {})}
        return Manifest(files=files, **fields)
    except (AttributeError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"{path}: not a manifest of gated-llama: {error}") from None


def as_text(content: bytes) -> str:
    """Return any bytes as a JSON string, from which `as_bytes` makes them again."""
    return content.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """Return the bytes from which `as_text` made a string."""
    return text.encode("utf-8", "surrogateescape")

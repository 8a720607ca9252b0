"""Records of a written checkpoint's files: sizes and hashes, by which a later change is found."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.dataclasses import strict

from modeling_gated.errors import ConversionError

from .files import sha256


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


def record(path: Path, source: str | None = None) -> FileRecord:
    """Return the record of a file, which is read for its hash."""
    return FileRecord(path.stat().st_size, sha256(path), source=source)


def check_stamp(path: Path, known: FileRecord) -> None:
    """Raise ConversionError if a file's size, or a hard-linked one's time stamp, is not the recorded one."""
    status = path.stat()
    if status.st_size != known.size:
        raise ConversionError(f"{path}: is not what conversion wrote ({status.st_size} bytes, not {known.size})")
    if known.sha256 is None and status.st_mtime_ns != known.mtime_ns:
        raise ConversionError(
            f"{path}: was hard-linked, not hashed, and has another time stamp since; gated-llama verify, with the "
            "source, tells whether its content is the same"
        )

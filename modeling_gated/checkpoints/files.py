"""Reading files that come from elsewhere, and making sure that what was written stays."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from modeling_gated.errors import ConversionError


CHUNK = 2**20
MAX_CONFIG_BYTES = 1_000_000  # Transformers takes seconds for each
MAX_BYTES = 100_000_000  # of a file that is read as a whole; as much as safetensors allows a header


@contextmanager
def errors_naming(output: str | os.PathLike) -> Iterator[None]:
    """Make what goes wrong with files a ConversionError that names the file, or else `output`."""
    try:
        yield
    except ConversionError:
        raise
    except OSError as error:
        raise ConversionError(f"{error.filename or output}: {error.strerror or error}") from error
    except (RuntimeError, ValueError) as error:  # links in a circle; a path with a null character
        raise ConversionError(f"{output}: {error}") from error
    except SafetensorError as error:  # how saving the dequantized model says that the disk is full
        raise ConversionError(f"{output}: {error}") from error


def resolve(directory: Path, name: str | Path) -> Path:
    """
    Return the regular file that a name of a checkpoint's directory stands for, its links followed.

    It must lie in the directory, or in the `blobs` of the hub cache that the directory is a snapshot of.

    Raises:
        ConversionError: if there is no such file, it is not a regular file, or it lies elsewhere.
    """
    path = directory / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:  # no file; links in a circle; a name that cannot be one
        missing = isinstance(error, FileNotFoundError) and not path.is_symlink()
        reason = "no such file" if missing else f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConversionError(f"{path}: {reason}") from None
    home = directory.resolve()
    allowed = [home] + [
        parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"
    ]  # huggingface_hub: models--owner--name/snapshots/revision/file -> ../../blobs/hash
    if not any(folder in target.parents for folder in allowed):
        raise ConversionError(f"{path}: leads to {target}, outside of the checkpoint")
    if not stat.S_ISREG(mode):
        raise ConversionError(f"{path}: not a regular file")
    return target


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Give a regular file, opened for reading; anything else, such as a pipe that would block, is refused."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConversionError(f"{path}: not a regular file")
        yield file


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """
    Return the content of a file of a source.

    Raises:
        ConversionError: if it cannot be read or is larger than any such file should be.
    """
    try:
        with opened(path) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise ConversionError(f"{path}: larger than {limit:,} bytes")
    return content


def read_json(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """
    Return the object in a JSON file of a source.

    Raises:
        ConversionError: if it is not a JSON object of bounded size and depth, or names a key twice.
    """
    return parse_json(path, read_bytes(path, limit))


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return the object in the JSON bytes of `path`, as `read_json` does."""
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is there twice")
    return value


def chunks(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    """Yield `size` bytes of a file from `offset` on, in chunks of bounded size."""
    file.seek(offset)
    while size:
        chunk = file.read(min(size, CHUNK))
        if not chunk:
            raise OSError(0, "ends too early", file.name)
        size -= len(chunk)
        yield chunk


def sha256(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of a file, in hexadecimal; `advance` is called with the number of bytes after each part."""
    with open(path, "rb") as file:
        return sha256_of(chunks(file, 0, os.fstat(file.fileno()).st_size), advance)


def sha256_of(parts: Iterable[bytes], advance: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of bytes that come in chunks."""
    digest = hashlib.sha256()
    for chunk in parts:
        digest.update(chunk)
        advance(len(chunk))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or a directory to disk (fsync), so that it is there after a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows has no way to open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

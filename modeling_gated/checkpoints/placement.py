"""Putting a file of the source into the result: by reflink, hard link or copy."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from rich.filesize import decimal

from modeling_gated.defaults import Place
from modeling_gated.errors import ConversionError

from .safetensors_file import Shard


Placement = Place | Literal["move"]

_FICLONE = 0x40049409  # from linux/fs.h
_CHUNK = 64 * 2**20


def check_space(needed: int, shards: Collection[Shard], directory: Path, output: Path, place: Placement) -> None:
    """
    Raise ConversionError, naming `output`, if `needed` bytes and what placing the shards takes do not fit on the disk.

    Whether files can share blocks is tried with one that is made in `directory` and removed again.
    """
    for first in list(shards)[:1]:
        probe = directory / "reflink"
        is_shared = place in ("link", "move") or (place != "copy" and _reflink(first.path, probe))
        probe.unlink(missing_ok=True)
        needed += 0 if is_shared else sum(shard.file_bytes for shard in shards)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ConversionError(f"{output}: {decimal(needed)} are needed, {decimal(free)} are free")


def place_file(source: Path, target: Path, place: Placement, advance: Callable[[int], object]) -> bool:
    """
    Make `target` a file with `source`'s bytes.

    Args:
        source: a regular file; links are resolved by the caller.
        target: a path that doesn't exist yet.
        place: `"reflink"` shares the blocks until one of the files is written to, `"link"` makes both names one
            file, `"copy"` copies, `"auto"` reflinks where the filesystem can and else copies. `"move"` takes the
            source away, which must be on the same filesystem.
        advance: called with the number of bytes after each part.

    Returns:
        Whether the bytes are shared with the source.

    Raises:
        ConversionError: if the filesystem cannot reflink or link here.
    """
    if place == "move":
        os.replace(source, target)
    elif place == "link":
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            raise ConversionError(
                f"place='link': {source} cannot be hard-linked to where the output lies: {error.strerror}"
            ) from None
    else:
        is_shared = place != "copy" and _reflink(source, target)
        if place == "reflink" and not is_shared:
            raise ConversionError(f"place='reflink': {source} cannot be reflinked to where the output lies")
        if not is_shared:
            _copy(source, target, advance)
        shutil.copymode(source, target)  # what others may not read, they may not read in the result
        if not is_shared:
            return False
    advance(target.stat().st_size)
    return place != "move"


def _reflink(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    with open(source, "rb") as reader, open(target, "xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False


def _copy(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    with open(source, "rb") as reader, open(target, "xb") as writer:
        copied = 0
        if sys.platform == "linux":
            try:
                while count := os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK):
                    copied += count
                    advance(count)
            except OSError:
                if copied:
                    raise
        if not copied:  # the kernel cannot copy between these two filesystems
            while chunk := reader.read(_CHUNK):
                writer.write(chunk)
                advance(len(chunk))

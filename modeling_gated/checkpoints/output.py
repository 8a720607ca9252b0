"""The directory of a result: what may be replaced, and how a new one appears only when it is complete."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from uuid import uuid4

from modeling_gated.configuration import SOURCE_FAMILIES, GatedLlamaConfig
from modeling_gated.errors import ConversionError

from .files import MAX_CONFIG_BYTES, read_json, resolve, sync


_LOCK = "lock"


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raise ConversionError if `output`, a resolved path, must not be made."""
    source = source.resolve()
    if source == output or source in output.parents or output in source.parents:
        raise ConversionError(f"{output}: the output and the source {source} must not contain each other")
    _check_replaceable(output, overwrite)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ConversionError(f"{output}: already exists; overwrite=True replaces it")
    if os.path.ismount(output):
        raise ConversionError(f"{output}: is a mount point, which cannot be replaced; name a directory in it")
    if not output.is_dir() or (any(output.iterdir()) and not _is_checkpoint(output)):
        raise ConversionError(f"{output}: neither a checkpoint nor an empty directory, so it is not overwritten")


def _is_checkpoint(directory: Path) -> bool:
    try:
        model_type = read_json(resolve(directory, "config.json"), MAX_CONFIG_BYTES).get("model_type")
    except ConversionError:
        return False
    return isinstance(model_type, str) and model_type in (GatedLlamaConfig.model_type, *SOURCE_FAMILIES)


def clear_leftovers(output: Path) -> None:
    """
    Remove what runs for this output left behind when they were killed; what still runs is left alone.

    A run that was killed between taking away the old result and putting the new one in its place left the old one
    under a hidden name; it is put back, or kept while anything but a checkpoint has the name.
    """
    pattern = re.compile(re.escape(f".{output.name}.") + "[0-9a-f]{32}")
    try:
        leftovers = [path for path in output.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:  # no such directory yet
        return
    for scratch in leftovers:
        if scratch.is_symlink():
            continue
        with suppress(OSError), _locked(scratch):
            if (scratch / "old").exists() and not os.path.lexists(output):
                (scratch / "old").rename(output)
            if not (scratch / "old").exists() or _is_checkpoint(output):
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """Hold the lock of a scratch directory, which the system frees when its holder ends. BlockingIOError if held."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there, leftovers stay, as nothing tells whether their run still lives
        raise OSError("no locks") from None
    descriptor = os.open(scratch / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def scratch_directory(output: Path) -> Iterator[Path]:
    """Give a new hidden directory next to `output`, removed at the end, after a failure with its new parents."""
    missing = [folder for folder in output.parents if not folder.exists()]
    # A name of its own, which no earlier run that was killed can have left behind.
    scratch = output.with_name(f".{output.name}.{uuid4().hex}")
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise ConversionError(f"{output}: cannot be made: {error.strerror}") from error
        with nullcontext() if os.name == "nt" else _locked(scratch):
            yield scratch
        shutil.rmtree(scratch, ignore_errors=True)  # in here, so that an interrupt during it is followed by another
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        if isinstance(error, OSError) and str(error.filename).startswith(str(scratch)):  # a name of no use to anyone
            raise ConversionError(f"{output}: {error.strerror}") from error
        raise


@contextmanager
def replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """
    Give a new directory that takes the name `output` on success. On failure it is removed, and what was there stays, as
    does what came there meanwhile, unless it may be overwritten.

    The caller has to `sync` the files it writes; the directories and the change of names are synced here.
    """
    with scratch_directory(output) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        for folder, _, _ in os.walk(new):
            sync(Path(folder))
        _check_replaceable(output, overwrite)
        try:
            if output.exists():
                output.rename(old)
            new.rename(output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise
        sync(output.parent)

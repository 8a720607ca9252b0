"""The shards and other files of a result: put in place several at a time, forced to disk and hashed."""

import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from modeling_gated.errors import ConversionError

from .checkpoint import Checkpoint
from .files import sha256, sync
from .placement import Placement, place_file
from .records import FileRecord, record
from .safetensors_file import NewTensor, Shard, write_safetensors


@dataclass(frozen=True)
class NewShard:
    """A shard to be written: its tensors, and the metadata of its header beside the format."""

    tensors: dict[str, NewTensor]
    metadata: dict[str, str] = field(default_factory=dict)


def write_shards(
    placed: Mapping[str, Shard], new: Mapping[str, NewShard], directory: Path, place: Placement, progress: bool
) -> tuple[dict[str, FileRecord], int]:
    """
    Put all shards into a directory under the names they are mapped from.

    Returns:
        Their records, and the bytes shared with the source.

    Raises:
        ConversionError: if a shard changes meanwhile, or cannot be placed so.
    """
    stop = threading.Event()
    hidden = None if progress else True  # None: tqdm hides the bar where there is no terminal
    read = 0 if place == "link" else sum(shard.file_bytes for shard in placed.values())
    total = read + sum(shard.file_bytes for shard in placed.values())

    with tqdm(total=total, desc="Placing and hashing", unit="B", unit_scale=True, disable=hidden) as bar:

        def advance(count: int) -> None:
            bar.update(count)
            if stop.is_set():
                raise InterruptedError

        def write_shard(name: str) -> tuple[FileRecord, int]:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in placed:
                return _place(placed[name], path, place, advance)
            digest = write_safetensors(path, new[name].tensors, new[name].metadata | {"format": "pt"})
            sync(path)
            return FileRecord(path.stat().st_size, digest), 0

        names = sorted([*placed, *new])
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            try:
                results = list(pool.map(write_shard, names))
            except BaseException:
                stop.set()  # a copy that runs ends at its next part
                pool.shutdown(cancel_futures=True)
                raise
    return {name: file_record for name, (file_record, _) in zip(names, results, strict=True)}, sum(
        size for _, size in results
    )


def _place(shard: Shard, target: Path, place: Placement, advance: Callable[[int], None]) -> tuple[FileRecord, int]:
    """Place a shard; return its record, with the source's name of it, and the bytes that it shares."""
    is_shared = place_file(shard.path, target, place, advance)
    status = target.stat()
    if status.st_size != shard.file_bytes:
        raise ConversionError(f"{shard.path}: changed while it was copied")
    if place == "link":  # one file with the source: not read, which would take as long as a copy, and on disk already
        return FileRecord(status.st_size, None, status.st_mtime_ns, source=shard.name), status.st_size
    sync(target)
    return FileRecord(status.st_size, sha256(target, advance), source=shard.name), status.st_size if is_shared else 0


def copy_side_files(checkpoint: Checkpoint, names: Collection[str], directory: Path) -> None:
    """Copy files that lie beside a checkpoint's weights, byte for byte."""
    for name in names:
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint.directory / name, target)


def record_others(directory: Path, records: Mapping[str, FileRecord], kept: Collection[str]) -> dict[str, FileRecord]:
    """Force to disk, and hash, the files that have no record yet; those in `kept` have the source's names."""
    records_of_others = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in records:
            records_of_others[name] = record(path, source=name if name in kept else None)
            sync(path)
    return records_of_others

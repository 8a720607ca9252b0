"""Conversion of a checkpoint into a gated one: of an ungated one, into one that starts as the same function."""

import json
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from modeling_gated.configuration import GatedLlamaConfig, open_gate

from .card import model_card
from .checkpoint import open_checkpoint
from .errors import ConversionError
from .files import errors_naming, read_bytes, sha256, sync
from .gguf import dequantize_gguf, gguf_headers
from .manifest import FileRecord, Manifest, as_text, record
from .output import check_output, clear_leftovers, replacing, scratch_directory
from .placement import Place, Placement, check_space, place_file
from .plan import CARD_NAME, OWN_FILES, Plan, make_plan
from .safetensors_file import Shard, write_safetensors
from .sources import find_source


Granularity = Literal["headwise", "elementwise"]


@dataclass(frozen=True)
class Conversion:
    """
    What a conversion made: the directory and its config, the parameters of the source and of the gates, the bytes
    of weights that were written and those shared with the source (by reflink or link), the tensors of the source that
    the model does not read, and the seconds it took.
    """

    output: Path
    config: GatedLlamaConfig
    base_parameters: int
    gate_parameters: int
    written_bytes: int
    shared_bytes: int
    unread: tuple[str, ...]
    seconds: float


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    granularity: Granularity | None = None,
    gate_init: float | None = None,
    place: Place = "auto",
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> Conversion:
    """
    Write a gated checkpoint that computes exactly what `source` does.

    The source's tensors are neither loaded nor changed: its shards become shards of the result, and the open gates
    one shard more. If the source has gates already, as rows of `q_proj`, they are taken out of it instead. The result
    appears under its name only when it is complete and on disk.

    Args:
        source: a directory with a checkpoint in safetensors, one safetensors file with its `config.json` beside it, a
            GGUF file, which is dequantized first, or a model on the Hugging Face hub, which is downloaded.
        output: the directory to make.
        granularity: one gate per head (`"headwise"`, the default) or per channel (`"elementwise"`).
        gate_init: the opening sigmoid(b) that the gates start from, strictly between 0 and 1; 0.85 if not given.
        place: how the source's shards get into the result. `"reflink"` shares their blocks until one side is
            written to, `"auto"` does so where the filesystem can and else copies, `"copy"` copies. `"link"` makes
            hard links: whoever later writes into a shard in place changes the source too.
        overwrite: replace `output` if it is an empty directory or a checkpoint.
        dtype: dtype of the dequantized tensors of a GGUF file, bfloat16 if not given.
        revision: the branch, tag or commit of a model on the hub.
        progress: show a progress bar, on a terminal.

    Raises:
        ConversionError: if the source cannot be converted or the output not be written. Nothing is left behind.
    """
    started = time.perf_counter()
    given = {"granularity": granularity, "gate_init": gate_init, "place": place, "dtype": dtype, "revision": revision}
    command = _command(source, output, given, overwrite)
    with errors_naming(output):
        output = Path(output).resolve()
        clear_leftovers(output)
        plan = plan_conversion(
            source,
            output,
            granularity=granularity,
            gate_init=gate_init,
            place=place,
            overwrite=overwrite,
            dtype=dtype,
            revision=revision,
        )
        if plan.source.is_gguf:
            with scratch_directory(output) as scratch:
                check_space(plan.new_bytes, plan.placed.values(), scratch, output, "copy")
                dequantized = scratch / "dequantized"
                dequantize_gguf(plan.source.path, dequantized, dtype or torch.bfloat16, progress=progress)
                plan = make_plan(plan.source, open_checkpoint(dequantized), _gate_options(granularity, gate_init))
                written, shared = _write(plan, output, overwrite, "move", command, progress)
        else:
            written, shared = _write(plan, output, overwrite, place, command, progress)
    return Conversion(
        output=output,
        config=plan.architecture.config,
        base_parameters=plan.base_parameters,
        gate_parameters=plan.gate_parameters,
        written_bytes=written,
        shared_bytes=shared,
        unread=plan.architecture.unread,
        seconds=time.perf_counter() - started,
    )


def plan_conversion(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    granularity: Granularity | None = None,
    gate_init: float | None = None,
    place: Place = "auto",
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Plan:
    """
    What `convert_checkpoint` would write with the same arguments, which are checked as there. Nothing is written.

    Of a GGUF file only the header is read, so that the plan knows one base shard, of about its size.

    Raises:
        ConversionError: if the conversion cannot be done.
    """
    with errors_naming(output):
        found = find_source(os.fspath(source), revision)
        check_output(found.path, Path(output).resolve(), overwrite)
        if found.is_gguf and place in ("reflink", "link"):
            raise ConversionError(f"--place {place}: {found.path} is dequantized, so there is nothing to share")
        if dtype is not None and not found.is_gguf:
            raise ConversionError(f"--dtype {dtype}: {found.path} is not a GGUF file, so its tensors keep their dtype")
        if gate_init is not None:
            try:
                open_gate(gate_init)
            except ValueError as error:
                raise ConversionError(f"--gate-init: {error}") from None
        checkpoint = gguf_headers(found.path, dtype or torch.bfloat16) if found.is_gguf else open_checkpoint(found.path)
        return make_plan(found, checkpoint, _gate_options(granularity, gate_init))


def _gate_options(granularity: Granularity | None, gate_init: float | None) -> dict[str, Any]:
    """The gate's fields that were given."""
    given = {"gate_granularity": granularity, "gate_init": gate_init}
    return {name: value for name, value in given.items() if value is not None}


def _command(source: str | os.PathLike, output: str | os.PathLike, given: dict[str, Any], overwrite: bool) -> str:
    """The command line that does what the call does."""
    words = ["gated-llama", "convert", os.fspath(source), os.fspath(output)]
    for name, value in given.items():
        if value is not None and (name, value) != ("place", "auto"):
            words += [f"--{name.replace('_', '-')}", str(value).removeprefix("torch.")]
    return shlex.join(words + ["--overwrite"] * overwrite)


def _write(
    plan: Plan, output: Path, overwrite: bool, place: Placement, command: str, progress: bool
) -> tuple[int, int]:
    """Write the result to `output`; return the bytes of weights written, and those shared with the source."""
    with replacing(output, overwrite) as staging:
        needed = plan.new_bytes + sum(os.path.getsize(plan.checkpoint.directory / name) for name in plan.side_files)
        check_space(needed, plan.placed.values(), staging, output, place)
        records, shared = _write_weights(plan, staging, place, progress)
        _write_side_files(plan, staging)
        (staging / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(plan.index(), indent=2, sort_keys=True) + "\n")
        plan.architecture.config.save_pretrained(staging)
        (staging / CARD_NAME).write_text(model_card(plan, output, command), encoding="utf-8", errors="replace")
        for path in sorted(path for path in staging.rglob("*") if path.is_file()):
            name = path.relative_to(staging).as_posix()
            if name not in records:
                records[name] = record(path, source=name if name in plan.side_files else None)
                sync(path)
        _manifest(plan, command, records).write(staging)
    total = plan.new_bytes + sum(shard.file_bytes for shard in plan.placed.values())
    return total - shared, shared


def _write_weights(plan: Plan, staging: Path, place: Placement, progress: bool) -> tuple[dict[str, FileRecord], int]:
    """Write all shards, each forced to disk and hashed; return their records and the bytes shared with the source."""
    stop = threading.Event()
    hidden = None if progress else True  # None: tqdm hides the bar where there is no terminal
    placed = plan.placed
    read = 0 if place == "link" else sum(shard.file_bytes for shard in placed.values())
    total = read + sum(shard.file_bytes for shard in placed.values())

    with tqdm(total=total, desc="Placing and hashing", unit="B", unit_scale=True, disable=hidden) as bar:

        def advance(count: int) -> None:
            bar.update(count)
            if stop.is_set():
                raise InterruptedError

        def one(name: str) -> tuple[FileRecord, int]:
            path = staging / name
            if name not in placed:
                metadata = plan.shards[name].metadata if name in plan.shards else {}
                digest = write_safetensors(path, plan.rewritten.get(name, plan.gates), metadata | {"format": "pt"})
                sync(path)
                return FileRecord(path.stat().st_size, digest), 0
            return _place(placed[name], path, place, advance)

        names = [*plan.shards, plan.gate_shard]
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            try:
                results = list(pool.map(one, names))
            except BaseException:
                stop.set()  # a copy that runs ends at its next part
                pool.shutdown(cancel_futures=True)
                raise
    return {name: found for name, (found, _) in zip(names, results, strict=True)}, sum(size for _, size in results)


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


def _write_side_files(plan: Plan, staging: Path) -> None:
    for name in plan.side_files:
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(plan.checkpoint.directory / name, target)


def _manifest(plan: Plan, command: str, records: dict[str, FileRecord]) -> Manifest:
    source, directory = plan.source, plan.checkpoint.directory
    origin: dict[str, Any] = {"name": source.name, "repo_id": source.repo_id, "revision": source.revision}
    origin["format"] = "gguf" if source.is_gguf else "safetensors" if plan.architecture.fused is None else "fused"
    if source.is_gguf:
        origin["sha256"] = sha256(source.path)
    replaced = {name: directory / name for name in OWN_FILES}
    return Manifest(
        command=command,
        source=origin,
        gates={name: value for name, value in plan.architecture.config.to_dict().items() if name.startswith("gate_")},
        files=records,
        replaced={name: as_text(read_bytes(path)) for name, path in replaced.items() if path.is_file()},
    )

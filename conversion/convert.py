"""Conversion of a checkpoint into a gated one: of an ungated one, into one that starts as the same function."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from modeling_gated.checkpoints.checkpoint import open_checkpoint, shorter_tokenizer
from modeling_gated.checkpoints.file_names import CARD_NAME, OWN_FILES
from modeling_gated.checkpoints.files import errors_naming, read_bytes, sha256
from modeling_gated.checkpoints.output import check_output, clear_leftovers, replacing, scratch_directory
from modeling_gated.checkpoints.placement import Placement, check_space
from modeling_gated.checkpoints.records import FileRecord
from modeling_gated.checkpoints.shards import NewShard, copy_side_files, record_others, write_shards
from modeling_gated.checkpoints.sources import find_source
from modeling_gated.configuration import GatedLlamaConfig, open_gate
from modeling_gated.defaults import GGUF_DTYPE, PLACE, Granularity, Place
from modeling_gated.errors import ConversionError

from .card import model_card
from .command_line import command_line, context_flags
from .gguf import dequantize_gguf, gguf_headers
from .manifest import Manifest, as_text
from .plan import Plan, make_plan


@dataclass(frozen=True)
class Conversion:
    """
    What a conversion made: the directory and its config, the parameters of the source and of the gates, the bytes
    of weights that were written and those shared with the source (by reflink or link), the tensors of the source that
    the model does not read, why the source's tokenizer could not be compared (None if it was, or there is none), the
    `model_max_length` of the tokenizer if that is less than an extended context, the seconds it took, notes on
    harmless disagreements between the source's index and its shards, notes on fields that only the source's KV cache
    reads, and the sizes in bytes of the source's files that did not come along.
    """

    output: Path
    config: GatedLlamaConfig
    base_parameters: int
    gate_parameters: int
    written_bytes: int
    shared_bytes: int
    unread: tuple[str, ...]
    tokenizer_error: str | None
    tokenizer_length: int | None
    seconds: float
    index_notes: tuple[str, ...] = ()
    config_notes: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    granularity: Granularity | None = None,
    gate_init: float | None = None,
    place: Place = PLACE,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    context: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Conversion:
    """
    Write a gated checkpoint that computes exactly what `source` does, or would with its context extended.

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
        context: arguments of `extend_context`, such as `{"length": 32768, "rope_theta": 1e6}`, to extend the context.
        progress: show a progress bar, on a terminal.

    Raises:
        ConversionError: if the source cannot be converted or the output not be written. Nothing is left behind.
    """
    started = time.perf_counter()
    options = {"granularity": granularity, "gate_init": gate_init, "place": place, "dtype": dtype, "revision": revision}
    command = command_line("convert", source, output, options | context_flags(context), overwrite)
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
            context=context,
        )
        if plan.source.is_gguf:
            with scratch_directory(output) as scratch:
                check_space(plan.new_bytes, plan.placed.values(), scratch, output, "copy")
                dequantized = scratch / "dequantized"
                dequantize_gguf(plan.source.path, dequantized, dtype or getattr(torch, GGUF_DTYPE), progress=progress)
                options = _gate_options(granularity, gate_init)
                plan = make_plan(plan.source, open_checkpoint(dequantized), options, plan.context)
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
        tokenizer_error=plan.tokenizer_error,
        tokenizer_length=shorter_tokenizer(output, plan.architecture.config.max_position_embeddings)
        if context
        else None,
        seconds=time.perf_counter() - started,
        index_notes=plan.architecture.index_notes,
        config_notes=plan.architecture.config_notes,
        left_out=plan.left_out,
    )


def plan_conversion(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    granularity: Granularity | None = None,
    gate_init: float | None = None,
    place: Place = PLACE,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    context: Mapping[str, Any] | None = None,
) -> Plan:
    """
    Check the arguments as `convert_checkpoint` does, and return what it would write. Nothing is written.

    Of a GGUF file only the header is read, so that the plan knows one base shard, of about its size.

    Raises:
        ConversionError: if the conversion cannot be done.
    """
    with errors_naming(output):
        location = find_source(os.fspath(source), revision)
        check_output(location.path, Path(output).resolve(), overwrite)
        if location.is_gguf and place in ("reflink", "link"):
            raise ConversionError(f"place={place!r}: {location.path} is dequantized, so there is nothing to share")
        if dtype is not None and not location.is_gguf:
            raise ConversionError(f"dtype={dtype}: {location.path} is not a GGUF file, so its tensors keep their dtype")
        if gate_init is not None:
            try:
                open_gate(gate_init)
            except ValueError as error:
                raise ConversionError(error) from None
        checkpoint = (
            gguf_headers(location.path, dtype or getattr(torch, GGUF_DTYPE))
            if location.is_gguf
            else open_checkpoint(location.path)
        )
        extensions = (context,) if context is not None else ()
        return make_plan(location, checkpoint, _gate_options(granularity, gate_init), extensions)


def _gate_options(granularity: Granularity | None, gate_init: float | None) -> dict[str, Any]:
    """Return the gate's fields that were given."""
    options = {"gate_granularity": granularity, "gate_init": gate_init}
    return {name: value for name, value in options.items() if value is not None}


def _write(
    plan: Plan, output: Path, overwrite: bool, place: Placement, command: str, progress: bool
) -> tuple[int, int]:
    """Write the result to `output`; return the bytes of weights written, and those shared with the source."""
    with replacing(output, overwrite) as staging:
        needed = plan.new_bytes + sum(os.path.getsize(plan.checkpoint.directory / name) for name in plan.side_files)
        check_space(needed, plan.placed.values(), staging, output, place)
        new = {name: NewShard(tensors, plan.shards[name].metadata) for name, tensors in plan.rewritten.items()}
        new[plan.gate_shard] = NewShard(plan.gates)
        records, shared = write_shards(plan.placed, new, staging, place, progress)
        copy_side_files(plan.checkpoint, plan.side_files, staging)
        for name, content in plan.tokenizer_files.items():
            (staging / name).write_bytes(content)
        (staging / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(plan.index(), indent=2, sort_keys=True) + "\n")
        _write_config(plan, staging)
        (staging / CARD_NAME).write_text(model_card(plan, output, command), encoding="utf-8", errors="replace")
        records |= record_others(staging, records, plan.side_files)
        _manifest(plan, command, records).write(staging)
    total = plan.new_bytes + sum(shard.file_bytes for shard in plan.placed.values())
    return total - shared, shared


def _write_config(plan: Plan, directory: Path) -> None:
    """Write the config and the code. Transformers reads a kernel of attention from a config, but writes none."""
    plan.architecture.config.save_pretrained(directory)
    raw = plan.checkpoint.raw_config
    if (kernel := raw.get("attn_implementation", raw.get("_attn_implementation"))) is not None:
        path = directory / CONFIG_NAME
        config = json.loads(path.read_text()) | {"attn_implementation": kernel}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _manifest(plan: Plan, command: str, records: dict[str, FileRecord]) -> Manifest:
    source, directory = plan.source, plan.checkpoint.directory
    origin: dict[str, Any] = {"name": source.name, "repo_id": source.repo_id, "revision": source.revision}
    origin["format"] = "gguf" if source.is_gguf else "safetensors" if plan.architecture.fused is None else "fused"
    if source.is_gguf:
        origin["sha256"] = sha256(source.path)
    replaced = {name: directory / name for name in (*OWN_FILES, *plan.tokenizer_files)}
    return Manifest(
        command=command,
        source=origin,
        gates={name: value for name, value in plan.architecture.config.to_dict().items() if name.startswith("gate_")},
        files=records,
        replaced={name: as_text(read_bytes(path)) for name, path in replaced.items() if path.is_file()},
        context=[dict(options) for options in plan.context],
        left_out=plan.left_out,
    )

"""Conversion of an ungated checkpoint into a gated one that starts as the same function."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from modeling_gated.configuration import GatedLlamaConfig, open_gate

from .checkpoint import Checkpoint, Shard, open_checkpoint
from .errors import ConversionError
from .gguf import dequantize_gguf
from .output import check_output, replacing, scratch_directory
from .placement import Place, place_file
from .tensors import base_tensor_shapes, gate_tensor_shapes, open_gate_tensor
from .writer import FLOATING_DTYPES, write_safetensors


@dataclass(frozen=True)
class Conversion:
    """
    What a conversion made: the directory and its config, the parameters of the source and of the gates, the bytes
    of weights that were written and those shared with the source (by reflink or link), and the seconds it took.
    """

    output: Path
    config: GatedLlamaConfig
    base_parameters: int
    gate_parameters: int
    written_bytes: int
    shared_bytes: int
    seconds: float


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    granularity: Literal["headwise", "elementwise"] = "headwise",
    gate_init: float = 0.85,
    place: Place = "auto",
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Conversion:
    """
    Write a gated checkpoint that computes exactly what `source` does.

    The source's tensors are neither loaded nor changed: its shards become shards of the result, and the open gates
    one shard more. The result appears under its name only when it is complete.

    Args:
        source: a directory with a Llama, Mistral, Qwen2 or Qwen3 checkpoint in safetensors, one safetensors file
            with its `config.json` beside it, or a GGUF file, which is dequantized first.
        output: the directory to make.
        granularity: one gate per head (`"headwise"`) or per channel (`"elementwise"`).
        gate_init: the opening sigmoid(b) that the gates start from, strictly between 0 and 1.
        place: how the source's shards get into the result. `"reflink"` shares their blocks until one side is
            written to, `"auto"` does so where the filesystem can and else copies, `"copy"` copies. `"link"` makes
            hard links: whoever later writes into a shard in place changes the source too.
        overwrite: replace `output` if it is an empty directory or a checkpoint.
        dtype: dtype of the dequantized tensors of a GGUF file, bfloat16 if not given.
        progress: show a progress bar, on a terminal.

    Raises:
        ConversionError: if the source cannot be converted or the output not be written. Nothing is left behind.
    """
    started = time.perf_counter()
    # The source keeps its name: in the hub's cache, files are links to blobs whose names say nothing.
    source, output = Path(source).absolute(), Path(output).resolve()
    if not source.exists():
        raise ConversionError(f"{source}: no such file or directory; a model on the hub has to be downloaded first")
    check_output(source, output, overwrite)
    is_gguf = source.suffix.lower() == ".gguf"
    if dtype is not None and not is_gguf:
        raise ConversionError(f"--dtype {dtype}: {source} is not a GGUF file, so its tensors keep their dtype")
    try:
        open_gate(gate_init)
    except ValueError as error:
        raise ConversionError(f"--gate-init: {error}") from None
    gate_options = {"gate_granularity": granularity, "gate_init": gate_init}

    try:
        if is_gguf:
            with scratch_directory(output) as dequantized:
                dequantize_gguf(source, dequantized, dtype or torch.bfloat16)
                checkpoint = open_checkpoint(dequantized)
                config = _gated_config(checkpoint, gate_options)
                # The dequantized shards go, and with them whatever the result shares.
                written, shared = sum(_write(checkpoint, config, output, place, progress)), 0
        else:
            checkpoint = open_checkpoint(source)
            config = _gated_config(checkpoint, gate_options)
            written, shared = _write(checkpoint, config, output, place, progress)
    except OSError as error:
        raise ConversionError(f"{error.filename or output}: {error.strerror or error}") from error
    except SafetensorError as error:  # how saving the dequantized model says that the disk is full
        raise ConversionError(f"{output}: {error}") from error
    return Conversion(
        output=output,
        config=config,
        base_parameters=sum(prod(shape) for _, shape in base_tensor_shapes(config)),
        gate_parameters=sum(prod(shape) for _, shape in gate_tensor_shapes(config)),
        written_bytes=written,
        shared_bytes=shared,
        seconds=time.perf_counter() - started,
    )


def _gated_config(checkpoint: Checkpoint, gate_options: dict[str, Any]) -> GatedLlamaConfig:
    """The result's config, checked against the source's tensors."""
    try:
        config = GatedLlamaConfig.from_source_config(checkpoint.config, **gate_options)
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"{checkpoint.directory / 'config.json'}: {error}") from None
    tensors = {name: (shard, *found) for shard in checkpoint.shards for name, found in shard.tensors.items()}
    for name, shape in base_tensor_shapes(config):
        if name not in tensors:
            raise ConversionError(f"{checkpoint.directory}: config.json asks for {name}, which is in no shard")
        shard, _, found = tensors[name]
        if found != shape:
            raise ConversionError(f"{shard.path}: {name} has shape {list(found)}, config.json asks for {list(shape)}")
    for name, _ in gate_tensor_shapes(config):
        if name in tensors:
            raise ConversionError(f"{tensors[name][0].path}: {name} is a gate, so the checkpoint is already gated")
    config.architectures = ["GatedLlamaForCausalLM"]
    config.dtype = _stored_dtype(checkpoint)
    return config


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which Transformers loads the checkpoint: its config's, else that of its first floating tensor."""
    stored = checkpoint.config.dtype
    if stored is None:
        codes = (code for code, _ in checkpoint.shards[0].tensors.values() if code in FLOATING_DTYPES)
        stored = FLOATING_DTYPES.get(next(codes, ""))
    if isinstance(stored, torch.dtype) and stored in FLOATING_DTYPES.values():
        return stored
    raise ConversionError(f"{checkpoint.directory}: dtype {stored} is not among {', '.join(FLOATING_DTYPES)}")


def _write(
    checkpoint: Checkpoint, config: GatedLlamaConfig, output: Path, place: Place, progress: bool
) -> tuple[int, int]:
    """Write the result to `output`; return the bytes of weights written, and those shared with the source."""
    gates, dtype = dict(gate_tensor_shapes(config)), _stored_dtype(checkpoint)
    count = len(checkpoint.shards) + 1
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    *shard_names, gate_name = names
    placements = dict(zip(shard_names, checkpoint.shards, strict=True))
    written, shared = sum(map(prod, gates.values())) * dtype.itemsize, 0

    with replacing(output) as staging:
        write_safetensors(
            staging / gate_name, gates, dtype, lambda name: open_gate_tensor(config, name, gates[name], dtype)
        )
        index = _index(placements, checkpoint.index_metadata, gate_name, gates, dtype)
        (staging / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for path in checkpoint.side_files():
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / path, staging / path)
        config.save_pretrained(staging)

        total = sum(shard.file_bytes for shard in checkpoint.shards)
        hidden = None if progress else True  # None: tqdm hides the bar where there is no terminal
        with tqdm(total=total, desc="Placing shards", unit="B", unit_scale=True, disable=hidden) as bar:
            for name, shard in placements.items():
                if place_file(shard.path, staging / name, place, bar.update):
                    shared += shard.file_bytes
                else:
                    written += shard.file_bytes
    return written, shared


def _index(
    placements: dict[str, Shard],
    metadata: dict[str, Any],
    gate_name: str,
    gates: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The result's index: the source's, under the shards' new names, and the gates."""
    parameters = sum(map(prod, gates.values()))
    data_bytes = sum(shard.data_bytes for shard in placements.values())
    metadata = metadata | {"total_size": data_bytes + parameters * dtype.itemsize}
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += parameters
    weight_map = {tensor: name for name, shard in placements.items() for tensor in shard.tensors}
    return {"metadata": metadata, "weight_map": weight_map | dict.fromkeys(gates, gate_name)}

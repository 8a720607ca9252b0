"""Conversion of an ungated checkpoint into a gated one that starts as the same function."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from modeling_gated.configuration import GatedLlamaConfig

from .checkpoint import Checkpoint, open_checkpoint
from .errors import ConversionError
from .gguf import dequantize_gguf
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
    source, output = Path(source).resolve(), Path(output).resolve()
    if not source.exists():
        raise ConversionError(f"{source}: no such file or directory; a model on the hub has to be downloaded first")
    _check_output(source, output, overwrite)
    is_gguf = source.suffix == ".gguf"
    if dtype is not None and not is_gguf:
        raise ConversionError(f"--dtype {dtype}: {source} is not a GGUF file, so its tensors keep their dtype")
    gate_options = {"gate_granularity": granularity, "gate_init": gate_init}

    try:
        if is_gguf:
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as dequantized:
                dequantize_gguf(source, dequantized, dtype or torch.bfloat16)
                checkpoint = open_checkpoint(Path(dequantized))
                config = _gated_config(checkpoint, gate_options)
                written, shared = _write(checkpoint, config, output, place, progress)
        else:
            checkpoint = open_checkpoint(source)
            config = _gated_config(checkpoint, gate_options)
            written, shared = _write(checkpoint, config, output, place, progress)
    except OSError as error:
        raise ConversionError(f"{error.filename or output}: {error.strerror or error}") from error
    return Conversion(
        output=output,
        config=config,
        base_parameters=sum(prod(shape) for _, shape in base_tensor_shapes(config)),
        gate_parameters=sum(prod(shape) for _, shape in gate_tensor_shapes(config)),
        written_bytes=written,
        shared_bytes=shared,
        seconds=time.perf_counter() - started,
    )


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    if source == output or source in output.parents or output in source.parents:
        raise ConversionError(f"{output}: the output and the source {source} must not contain each other")
    if not output.exists():
        return
    if not overwrite:
        raise ConversionError(f"{output}: already exists; --overwrite replaces it")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise ConversionError(f"{output}: neither a checkpoint nor an empty directory, so it is not overwritten")


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
    if config.dtype is None:
        config.dtype = _common_dtype(checkpoint)
    if config.dtype not in FLOATING_DTYPES.values():
        raise ConversionError(f"{checkpoint.directory / 'config.json'}: dtype={config.dtype} is not supported")
    return config


def _common_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the tensors of a checkpoint whose config names none: what Transformers would load it in."""
    shard = checkpoint.shards[0]
    for dtype, _ in shard.tensors.values():
        if dtype in FLOATING_DTYPES:
            return FLOATING_DTYPES[dtype]
    raise ConversionError(f"{shard.path}: none of its tensors has a dtype among {', '.join(FLOATING_DTYPES)}")


def _write(
    checkpoint: Checkpoint, config: GatedLlamaConfig, output: Path, place: Place, progress: bool
) -> tuple[int, int]:
    """Write the result to `output`; return the bytes of weights written, and those shared with the source."""
    gates = dict(gate_tensor_shapes(config))
    gate_parameters = sum(map(prod, gates.values()))
    gate_bytes = gate_parameters * config.dtype.itemsize
    count = len(checkpoint.shards) + 1
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    weight_map = {
        tensor: name for name, shard in zip(names, checkpoint.shards, strict=False) for tensor in shard.tensors
    }
    weight_map |= dict.fromkeys(gates, names[-1])
    metadata = checkpoint.index_metadata | {
        "total_size": sum(shard.data_bytes for shard in checkpoint.shards) + gate_bytes
    }
    if "total_parameters" in metadata:
        metadata["total_parameters"] += gate_parameters

    written, shared = gate_bytes, 0
    with _replacing(output) as staging:
        write_safetensors(
            staging / names[-1],
            gates,
            config.dtype,
            lambda name: open_gate_tensor(config, name, gates[name], config.dtype),
        )
        index = {"metadata": metadata, "weight_map": weight_map}
        (staging / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for name in checkpoint.side_files():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, staging / name)
        config.save_pretrained(staging)

        sizes = [shard.path.stat().st_size for shard in checkpoint.shards]
        bar = tqdm(
            total=sum(sizes), desc="Placing shards", unit="B", unit_scale=True, disable=None if progress else True
        )
        with bar:
            for shard, name, size in zip(checkpoint.shards, names, sizes, strict=False):
                if place_file(shard.path, staging / name, place, bar.update):
                    shared += size
                else:
                    written += size
    return written, shared


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A new directory beside `output` that takes its name on success, and is removed on failure."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    staging.mkdir()
    try:
        yield staging
        if output.exists():
            replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
            output.rename(replaced)
            staging.rename(output)
            shutil.rmtree(replaced)
        else:
            staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise

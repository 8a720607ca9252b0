"""GGUF files: dequantized by Transformers into an ordinary checkpoint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_gated.checkpoints.checkpoint import Checkpoint
from modeling_gated.checkpoints.files import opened
from modeling_gated.checkpoints.safetensors_file import FLOATING_DTYPES, Shard, Tensor
from modeling_gated.configuration import GatedLlamaConfig, check_source_family
from modeling_gated.errors import ConversionError

from .tensors import base_tensor_shapes


def gguf_headers(source: Path, dtype: torch.dtype) -> Checkpoint:
    """
    Return what `dequantize_gguf` will write, by the file's header: the config, and one shard of about the total size.

    Raises:
        ConversionError: if the file is damaged, or of an architecture that cannot be converted.
    """
    config = _read_config(source)
    with _reading(source):
        shapes = dict(base_tensor_shapes(GatedLlamaConfig.from_source_config(config)))
    code = next(code for code, known in FLOATING_DTYPES.items() if known == dtype)
    tensors = {name: Tensor(code, shape, offset=0, size=prod(shape) * dtype.itemsize) for name, shape in shapes.items()}
    size = sum(tensor.size for tensor in tensors.values())
    raw = {name: value for name, value in config.to_dict().items() if value is not None}
    raw["dtype"] = str(dtype).removeprefix("torch.")
    # A file's name in the place of a directory's: there are no side files.
    return Checkpoint(source, raw, (Shard(source.name, source, tensors, {}, size),), {})


def dequantize_gguf(
    source: str | os.PathLike,
    output: str | os.PathLike,
    dtype: torch.dtype = torch.bfloat16,
    *,
    progress: bool = False,
) -> None:
    """
    Write a GGUF file's model, dequantized, and its tokenizer as an ordinary safetensors checkpoint.

    Args:
        source: the GGUF file, of a model of a supported family.
        output: the directory to write to; it is made if missing.
        dtype: dtype of the written tensors.
        progress: say on a terminal that it is at work; it takes half a minute for 135M parameters.

    Raises:
        ConversionError: if the file is damaged, or of an architecture that cannot be converted.
    """
    source = Path(source)
    config = _read_config(source)
    with Console(stderr=True, quiet=not progress).status(f"Dequantizing {source.name}"):
        model, tokenizer = load_gguf(source, dtype, config=deepcopy(config))
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)


def load_gguf(
    source: Path, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Return a GGUF file's model, dequantized, and its tokenizer, of any architecture that Transformers reads.

    Args:
        source: the GGUF file.
        dtype: of the model's tensors.
        options: for `from_pretrained` of the model.

    Raises:
        ConversionError: if the file is damaged, or of another architecture.
    """
    # From 5.17 on Transformers keeps the weights packed unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(gguf_file=source.name, dequantize=True)
    with _reading(source), _alone(source) as where:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, **options)
        return model, transformers.AutoTokenizer.from_pretrained(**where)


@contextmanager
def _alone(source: Path) -> Iterator[dict[str, Any]]:
    """
    Give a directory of its own in which Transformers finds the file, since it would also read an adapter's config, a
    tokenizer's and their code beside it.
    """
    with TemporaryDirectory() as directory:
        (Path(directory) / source.name).symlink_to(source.resolve())
        yield {
            "pretrained_model_name_or_path": directory,
            "gguf_file": source.name,
            "local_files_only": True,
            "trust_remote_code": False,
        }


def _read_config(source: Path) -> PreTrainedConfig:
    with opened(source) as file:
        if file.read(4) != b"GGUF":
            raise ConversionError(f"{source}: not a GGUF file")
        status = os.fstat(file.fileno())
    with _reading(source):
        config = _parse_config(source, (status.st_size, status.st_mtime_ns))
    try:
        check_source_family(config.model_type)
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from None
    return config


@lru_cache(maxsize=1)
def _parse_config(source: Path, _stamp: tuple[int, int]) -> PreTrainedConfig:
    """Return Transformers' config of a file. It is cached until the file changes, since reading takes seconds."""
    with _alone(source) as where:
        return transformers.AutoConfig.from_pretrained(**where)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Make what goes wrong while Transformers reads `source` a ConversionError."""
    try:
        yield
    except ImportError as error:
        raise ConversionError(f"{source}: reading GGUF needs the gguf package (pip install gguf): {error}") from None
    except Exception as error:  # Transformers' reader has no error of its own for a damaged file
        reason = str(error) or type(error).__name__
        raise ConversionError(f"{source}: not a complete GGUF file that Transformers can read: {reason}") from None

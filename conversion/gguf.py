"""GGUF files: dequantized by Transformers into an ordinary checkpoint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from modeling_gated.configuration import check_source_family

from .errors import ConversionError


def dequantize_gguf(source: str | os.PathLike, output: str | os.PathLike, dtype: torch.dtype = torch.bfloat16) -> None:
    """
    Write a GGUF file's model, dequantized, and its tokenizer as an ordinary safetensors checkpoint.

    Args:
        source: the GGUF file, of a Llama, Mistral, Qwen2 or Qwen3 model.
        output: the directory to write to; it is made if missing.
        dtype: dtype of the written tensors.

    Raises:
        ConversionError: if the file is damaged, or of an architecture that cannot be converted.
    """
    source = Path(source)
    with open(source, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ConversionError(f"{source}: not a GGUF file")
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.parent,
        "gguf_file": source.name,
        "local_files_only": True,
    }
    with _reading(source):
        config = transformers.AutoConfig.from_pretrained(**where)
    try:
        check_source_family(config.model_type)
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from None
    with _reading(source):
        # From 5.17 on Transformers keeps the weights packed unless told otherwise.
        if hasattr(transformers, "GgufConfig"):
            where["quantization_config"] = transformers.GgufConfig(gguf_file=source.name, dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Make what goes wrong while Transformers reads `source` a ConversionError."""
    try:
        yield
    except ImportError as error:
        raise ConversionError(f"{source}: reading GGUF needs the gguf package (pip install gguf): {error}") from None
    except Exception as error:  # Transformers' reader has no error of its own for a damaged file
        raise ConversionError(f"{source}: Transformers cannot read it: {error or type(error).__name__}") from None

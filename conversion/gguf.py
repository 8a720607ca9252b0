"""GGUF files: dequantized by Transformers into an ordinary checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from modeling_gated.configuration import SOURCE_FAMILIES

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
    try:
        config = transformers.AutoConfig.from_pretrained(**where)
        if config.model_type not in SOURCE_FAMILIES:
            supported = ", ".join(SOURCE_FAMILIES)
            raise ConversionError(
                f"{source}: architecture {config.model_type!r} is not supported; supported: {supported}"
            )
        # From 5.17 on Transformers keeps the weights packed unless told otherwise.
        if hasattr(transformers, "GgufConfig"):
            where["quantization_config"] = transformers.GgufConfig(gguf_file=source.name, dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except ConversionError:
        raise
    except ImportError as error:
        raise ConversionError(f"{source}: reading GGUF needs the gguf package (pip install gguf): {error}") from None
    except Exception as error:  # Transformers' reader has no error of its own for a damaged file
        raise ConversionError(f"{source}: Transformers cannot read it: {error or type(error).__name__}") from None
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

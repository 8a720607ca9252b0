"""The models that a user names, loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_models(names: list[str]) -> list[Path]:
    """Where they lie: directories with a checkpoint in safetensors, or GGUF files."""
    from modeling_gated.checkpoints.sources import find_source
    from modeling_gated.evaluation import EvaluationError

    sources = [find_source(name) for name in names]
    if files := [source.path for source in sources if not (source.path.is_dir() or source.is_gguf)]:
        raise EvaluationError(f"{files[0]}: neither a directory with a checkpoint in safetensors nor a GGUF file")
    return [source.path for source in sources]


def names_of(names: list[str]) -> list[str]:
    """The last part of each path or hub id; the whole of it where that is not enough."""
    last = [Path(name).name or Path(name).resolve().name for name in names]
    return [last_part if last.count(last_part) == 1 else name for name, last_part in zip(names, last, strict=True)]


def find_device(requested: str | None) -> "torch.device":
    import torch

    from modeling_gated.evaluation import EvaluationError

    try:
        device = torch.device(requested or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises for a device that is not there
        reason = str(error).splitlines()[0].split(". ")[0]
        raise EvaluationError(
            f"--device {requested}: {reason}; give a device that torch can use here, such as cpu"
        ) from None
    return device


def load_model(path: Path, dtype: str, device: "torch.device") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    A causal language model, in evaluation mode, and its tokenizer. No code of the checkpoint's is run. With `dtype`
    `"auto"`, a model has its checkpoint's dtype, and that of a GGUF file bfloat16.

    Raises:
        ConversionError: if Transformers cannot load it, weights are not finite, or generation_config.json is damaged.
        TokenizerError: if its tokenizer cannot be loaded.
        EvaluationError: if it lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from modeling_gated.checkpoints.loading import (
        check_shapes,
        check_weights,
        model_errors,
        read_generation_config,
        read_model_config,
    )
    from modeling_gated.checkpoints.tokenization import load_tokenizer
    from modeling_gated.conversion.gguf import load_gguf
    from modeling_gated.evaluation import EvaluationError

    if path.is_file():
        model, tokenizer = load_gguf(path, torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
        tokenizer.name_or_path = str(path)  # in errors, instead of a temporary directory
        check_weights(model, path)
        return model.eval().to(device), tokenizer
    config = read_model_config(path)  # first: Transformers reads it for the tokenizer, too
    tokenizer, generation_config = load_tokenizer(path), read_generation_config(path)
    with model_errors(path, config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            generation_config=generation_config,
            ignore_mismatched_sizes=True,  # check_shapes refuses them, and names one
            output_loading_info=True,
        )
    model, info = loaded
    check_shapes(info["mismatched_keys"], path)
    if info["missing_keys"]:
        raise EvaluationError(f"{path}: has no {min(info['missing_keys'])}; get the checkpoint again")
    check_weights(model, path)
    model.config.return_dict, model.config.output_hidden_states = True, False  # whatever config.json says
    return model.eval().to(device), tokenizer

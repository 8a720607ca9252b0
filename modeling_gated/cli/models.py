"""Load the models that a user names."""

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_models(names: list[str]) -> list[Path]:
    """
    Return the path of each model: a directory with a checkpoint in safetensors, or a GGUF file.

    Args:
        names: paths, or ids of models on the hub.

    Raises:
        EvaluationError: if a path is another kind of file.
        ConversionError: if a model cannot be found or downloaded.
    """
    from modeling_gated.checkpoints.sources import find_source
    from modeling_gated.evaluation import EvaluationError

    sources = [find_source(name) for name in names]
    if files := [source.path for source in sources if not (source.path.is_dir() or source.is_gguf)]:
        raise EvaluationError(
            f"{files[0]}: must be a directory with a checkpoint in safetensors or a GGUF file; give the directory"
        )
    return [source.path for source in sources]


def names_of(names: list[str]) -> list[str]:
    """Return a display name for each model: the last part of the path or hub id, or all of it if not unique."""
    last = [Path(name).name or Path(name).resolve().name for name in names]
    return [last_part if last.count(last_part) == 1 else name for name, last_part in zip(names, last, strict=True)]


def find_device(requested: str | None) -> "torch.device":
    """
    Return a torch device, after a small allocation on it. None means the GPU if there is one, otherwise the CPU.

    Raises:
        EvaluationError: if torch cannot use the device.
    """
    import torch

    from modeling_gated.evaluation import EvaluationError

    try:
        device = torch.device(requested or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises one of these for a missing device
        reason = str(error).splitlines()[0].split(". ")[0]
        raise EvaluationError(
            f"--device must be usable by torch, got {requested}: {reason}; choose another device, such as cpu"
        ) from None
    return device


def load_model(path: Path, dtype: str, device: "torch.device") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    Load a causal language model, in evaluation mode, and its tokenizer. The checkpoint's own code is not run.

    Args:
        path: directory with a checkpoint in safetensors, or a GGUF file.
        dtype: name of the weights' dtype. `"auto"` means the checkpoint's dtype, and bfloat16 for a GGUF file.
        device: device to load the model on.

    Raises:
        ConversionError: if Transformers cannot load the model, weights are not finite, or generation_config.json is
            damaged.
        TokenizerError: if the tokenizer cannot be loaded.
        EvaluationError: if the checkpoint lacks weights.
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
        tokenizer.name_or_path = str(path)  # so that errors name the file, not a temporary directory
        check_weights(model, path)
        return model.eval().to(device), tokenizer
    config = read_model_config(path)  # first, because Transformers reads the config for the tokenizer too
    tokenizer, generation_config = load_tokenizer(path), read_generation_config(path)
    with model_errors(path, config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            generation_config=generation_config,
            ignore_mismatched_sizes=True,  # check_shapes refuses mismatches and names a tensor
            output_loading_info=True,
        )
    model, info = loaded
    check_shapes(info["mismatched_keys"], path)
    if info["missing_keys"]:
        raise EvaluationError(
            f"{path}: must have all weights, got no {min(info['missing_keys'])}; download the checkpoint again"
        )
    check_weights(model, path)
    model.config.return_dict, model.config.output_hidden_states = True, False  # override config.json
    return model.eval().to(device), tokenizer

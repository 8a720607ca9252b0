"""Checks of a checkpoint's model that every command makes when it loads one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

import modeling_gated.registration  # noqa: F401 - makes the Auto classes know gated_llama
from modeling_gated.errors import ConversionError

from .checkpoint import open_checkpoint
from .config import naming
from .files import MAX_CONFIG_BYTES, read_json, resolve


_ADAPTER_CONFIG = "adapter_config.json"


def read_model_config(directory: Path) -> PreTrainedConfig | None:
    """
    Read a checkpoint's config.json as Transformers does. No code of the checkpoint is run.

    Returns:
        The config; None for an adapter without a config.json, whose base model Transformers finds.

    Raises:
        ConversionError: if config.json or adapter_config.json is missing or damaged, or the model needs code of its
            own or a newer Transformers.
    """
    path = directory / CONFIG_NAME
    if (directory / _ADAPTER_CONFIG).exists():
        read_json(directory / _ADAPTER_CONFIG)
        if not path.exists():
            return None
    if not path.exists():
        raise ConversionError(f"{path}: no such file; get the checkpoint again, or give another directory")
    raw = read_json(path, MAX_CONFIG_BYTES)
    with naming(path):
        try:
            return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            if raw.get("auto_map") and "trust_remote_code" in str(error):
                raise ConversionError(
                    f"{path}: model_type={raw.get('model_type')!r} needs code of the checkpoint's, which is never run; "
                    "give a model of a type that Transformers has"
                ) from None
            raise


@contextmanager
def model_errors(directory: Path, config: PreTrainedConfig | None) -> Iterator[None]:
    """
    Make what Transformers raises while it loads a model a ConversionError that names the file or the field.

    Args:
        directory: the checkpoint.
        config: the checkpoint's config, as `read_model_config` returns it.
    """
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:  # Transformers has no error of its own for damaged checkpoints
        raise ConversionError(_why_not_loaded(directory, config, error)) from None


def _why_not_loaded(directory: Path, config: PreTrainedConfig | None, error: Exception) -> str:
    if isinstance(error, OSError | SafetensorError) and not (directory / _ADAPTER_CONFIG).exists():
        try:
            open_checkpoint(directory)
        except ConversionError as damage:  # names the shard
            return str(damage)
    if config is not None and _fails_by_attention(config):
        return (
            f"{directory / CONFIG_NAME}: attn_implementation must be one that runs on this machine, got "
            f"{config._attn_implementation!r}; remove the field or set it to 'sdpa': {error}"
        )
    return f"{directory}: {error or type(error).__name__}"


def _fails_by_attention(config: PreTrainedConfig) -> bool:
    """Return whether a model can be made of a config with eager attention, and not with the config's own."""
    as_configured, eager = deepcopy(config), deepcopy(config)
    eager._attn_implementation = "eager"
    return not _can_be_made(as_configured) and _can_be_made(eager)


def _can_be_made(config: PreTrainedConfig) -> bool:
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # of any kind: whatever the config's fields meet in a model's code
        return False
    return True


def check_shapes(mismatched: Any, name: object) -> None:
    """
    Check that Transformers found no tensor whose shape is not the config's.

    Args:
        mismatched: names with the shapes in the checkpoint and in the model, as `output_loading_info` gives them.
        name: the checkpoint, with which the error begins.

    Raises:
        ConversionError: if there is one.
    """
    for tensor_name, shape, wanted in sorted(mismatched)[:1]:
        raise ConversionError(
            f"{name}: {tensor_name} must have the shape {list(wanted)} that config.json asks for, got {list(shape)}; "
            "correct config.json, or get the checkpoint again"
        )


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """
    Read which tokens end an answer from a checkpoint's generation_config.json; all its other fields are left out.

    Returns:
        The config; None if there is no such file.

    Raises:
        ConversionError: if the file is damaged, or `eos_token_id` is neither a token id nor a list of them.
    """
    path = directory / GENERATION_CONFIG_NAME
    if not path.exists():
        return None
    return GenerationConfig(
        eos_token_id=checked_end(read_json(resolve(directory, path.name)).get("eos_token_id"), path)
    )


def checked_end(eos_token_id: Any, name: object) -> Any:
    """
    Return `eos_token_id` if generation can use it: a token id, a list of them, or None.

    Raises:
        ConversionError: if it is something else. The message begins with `name`.
    """
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    if eos_token_id is not None and not (ids and all(type(token) is int for token in ids)):
        raise ConversionError(
            f"{name}: eos_token_id must be a token id or a list of token ids, got {eos_token_id!r}; correct it "
            "or remove the field"
        )
    return eos_token_id


def check_weights(model: PreTrainedModel, name: object) -> None:
    """
    Check that all of a model's weights are finite numbers.

    Raises:
        ConversionError: if one is not. The message begins with `name`.
    """
    for parameter_name, parameter in model.named_parameters():
        # Transformers' float8 and packed tensors are left alone: torch cannot compare them.
        if not parameter.is_floating_point() or parameter.element_size() < 2 or parameter.is_meta:
            continue
        if parameter.numel() and not all(math.isfinite(bound) for bound in parameter.detach().aminmax()):
            raise ConversionError(
                f"{name}: {parameter_name} must have finite numbers only, got NaN or infinity; the checkpoint is "
                "damaged, so get it again"
            )

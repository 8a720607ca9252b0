"""Checks of a checkpoint's model that every command makes when it loads one."""

import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from modeling_gated.conversion.errors import ConversionError
from modeling_gated.conversion.files import read_json, resolve


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

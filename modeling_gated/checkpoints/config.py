"""A checkpoint's config.json, of Transformers' own class or of the gated model's, not yet compared with its tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_gated.configuration import GatedLlamaConfig, check_source_family
from modeling_gated.errors import ConversionError

from .checkpoint import Checkpoint
from .safetensors_file import FLOATING_DTYPES


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING_DTYPES.values()}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_MAX_SIZE = 2**31  # no size is larger; a few of them make Transformers' configs build a list as long
# Fields that say how a model runs on a machine and what it returns, with the values that every machine can run.
_RUN_SETTINGS: dict[str, Any] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
    "_attn_implementation": "sdpa",
    "_experts_implementation": None,
}


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Make what Transformers' configs raise a ConversionError that begins with `where`."""
    try:
        yield
    except ConversionError:
        raise
    except StrictDataclassError as error:
        raise ConversionError(f"{where}: {error.__cause__ or error}") from None
    except Exception as error:  # whatever they make of a damaged config, it names the field
        raise ConversionError(f"{where}: {error or type(error).__name__}") from None


def is_qwen3_next(raw: dict[str, Any]) -> bool:
    """Return whether a config.json is that of a Qwen3-Next, whose norm weights are added to 1."""
    return raw.get("model_type") == "qwen3_next"


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """
    Return the config of a checkpoint, gated or to be gated, of its own class; not yet compared with its tensors.

    Raises:
        ConversionError: if it is of an architecture that is not supported, or damaged.
    """
    raw = deepcopy(checkpoint.raw_config)  # Transformers' configs write into the dicts that they are given
    with naming(checkpoint.config_path):
        _check_raw(raw, checkpoint.layers())
        if raw.get("model_type") == GatedLlamaConfig.model_type:
            return GatedLlamaConfig.from_dict(raw)
        if raw.get("model_type") == "mistral" and "layer_types" in raw:  # as AutoConfig takes it
            raw = raw | {"model_type": "ministral"}
        if not is_qwen3_next(raw):
            check_source_family(raw.get("model_type"))
        if raw["model_type"] not in CONFIG_MAPPING:
            raise ValueError(
                f"model_type={raw['model_type']!r} is not known to Transformers {transformers.__version__}"
            )
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)


def with_default_run_settings(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    Return a copy of a config that says nothing of how to run the model, such as by which kernel of attention.

    Two models that are compared must run alike: kernels differ in rounding, and some machines lack some of them.
    """
    config = deepcopy(config)
    for name, value in _RUN_SETTINGS.items():
        setattr(config, name, value)
    return config


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """
    Return the dtype in which Transformers loads the checkpoint: its config's, else that of its first floating tensor.

    Of a quantized checkpoint it is the embeddings', as some schemes load what is not quantized just as it is stored.
    """
    if checkpoint.raw_config.get("quantization_config"):
        shard, tensor = checkpoint.tensors()["model.embed_tokens.weight"]
        if tensor.dtype not in FLOATING_DTYPES:
            raise ConversionError(f"{shard.path}: model.embed_tokens.weight is {tensor.dtype}, so it is quantized too")
        return FLOATING_DTYPES[tensor.dtype]
    stored = checkpoint.raw_config.get("dtype") or checkpoint.raw_config.get("torch_dtype")
    if stored is not None:
        return DTYPES[stored.removeprefix("torch.")]
    codes = (tensor.dtype for tensor in checkpoint.shards[0].tensors.values())
    code = next((code for code in codes if code in FLOATING_DTYPES), None)
    if code is None:
        raise ConversionError(f"{checkpoint.directory}: no tensor is among {', '.join(FLOATING_DTYPES)}")
    return FLOATING_DTYPES[code]


def _check_raw(raw: dict[str, Any], layers: int) -> None:
    """Raise ValueError for what must not reach Transformers' configs, which trust their input."""
    for name in _SIZES:
        value = raw.get(name)
        if type(value) is int and not 1 <= value < _MAX_SIZE:
            raise ValueError(f"{name} must be at least 1 and less than {_MAX_SIZE}, got {value}")
    count = raw.get("num_hidden_layers")
    if type(count) is int and count > layers:
        raise ValueError(f"num_hidden_layers={count}, but the shards hold {layers} layers (no model.layers.{layers}.)")
    if (labels := raw.get("num_labels")) is not None and not (type(labels) is int and 0 <= labels <= 10**6):
        raise ValueError(f"num_labels={labels!r} is no number of labels")
    for name in ("dtype", "torch_dtype"):
        if (value := raw.get(name)) is not None and (
            not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES
        ):
            raise ValueError(f"{name}={value!r} is not among {', '.join(DTYPES)}")
    if not isinstance(raw.get("quantization_config"), dict | None):
        raise ValueError(f"quantization_config={raw['quantization_config']!r} is not an object")
    for name in ("per_layer_config", "configuration_files"):
        if raw.get(name):
            raise ValueError(f"{name} is not supported")

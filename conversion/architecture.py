"""The model in a checkpoint: its config.json, checked against its headers, as the config of the gated model."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_gated.checkpoints.checkpoint import Checkpoint
from modeling_gated.checkpoints.config import (
    is_qwen3_next,
    naming,
    read_config,
    stored_dtype,
    with_default_run_settings,
)
from modeling_gated.checkpoints.index import check_index
from modeling_gated.checkpoints.safetensors_file import FLOATING_DTYPES
from modeling_gated.configuration import GatedLlamaConfig, check_source_family, extend_context
from modeling_gated.errors import ConversionError

from .fused import AUTHORS_FLAGS, FusedGates, fused_gates, is_fused, ungated_config
from .gates import gate_tensor_shapes
from .quantization import exclude_gates
from .tensors import LINEARS, base_tensor_shapes


# Fields of the paper's other variants, which conversion leaves at their defaults.
_OF_OTHER_VARIANTS = (
    "gate_logit_lse_weight",
    *("gate_position", "gate_head_shared", "gate_form", "gate_activation", "gate_input_independent"),
    *("use_attention_output_norm", "attention_output_activation", "use_sandwich_norm", "use_glu"),
)
_IN_NO_SHARD = "in no shard; correct config.json, or download the checkpoint or save the whole model again"
# What Transformers leaves unread in a checkpoint without a word.
UNREAD = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Architecture:
    """
    What a source is made of: its config, of Transformers' own class; the config of the gated
    model; the dtype that it loads in, which is the gates'; and, if the source has gates, how they lie in its `q_proj`.

    `unread` names the tensors of the source that the model does not read, and `index_notes` are sentences on harmless
    disagreements between the index and the shards, `config_notes` on fields that only the source's KV cache reads.
    """

    source_config: PreTrainedConfig
    config: GatedLlamaConfig
    dtype: torch.dtype
    fused: FusedGates | None
    unread: tuple[str, ...]
    index_notes: tuple[str, ...] = ()
    config_notes: tuple[str, ...] = ()


def read_architecture(
    checkpoint: Checkpoint, gate_options: dict[str, Any], context: Sequence[Mapping[str, Any]] = ()
) -> Architecture:
    """
    Find out what an ungated checkpoint, or one with fused gates, holds.

    Args:
        checkpoint: the source.
        gate_options: `gate_granularity` and `gate_init`, as far as the user gave them.
        context: arguments of `extend_context`, for each of the extensions that both configs get.

    Raises:
        ConversionError: if it is of an architecture that cannot be converted, its tensors don't fit its config, or
            its context cannot be extended so.
    """
    raw = checkpoint.raw_config
    source_config = read_config(checkpoint)
    with naming(checkpoint.config_path):
        if not is_qwen3_next(raw):
            check_source_family(source_config.model_type)
        quantization = raw.get("quantization_config")
        if quantization is not None:
            quantization = exclude_gates(quantization)
        decoder, fused = source_config, None
        if is_fused(raw):
            if quantization is not None:
                raise ValueError("quantization_config: quantized checkpoints with fused gates are not supported")
            decoder = ungated_config(raw)
            fused = fused_gates(raw, decoder)
            gate_options = _options_of_fused(raw, decoder, fused, gate_options)
        config = GatedLlamaConfig.from_source_config(decoder, **gate_options)
        for options in context:
            for extended in (source_config, config):
                extend_context(extended, **options)
        if quantization is not None:
            config.quantization_config = quantization
    tensors = checkpoint.tensors()
    read, index_notes = _check_base_tensors(checkpoint, config, fused)
    unread = tuple(name for name in tensors if name not in read and not UNREAD.fullmatch(name))
    if gates := [name for name, _ in gate_tensor_shapes(config) if name in tensors]:
        raise ConversionError(f"{tensors[gates[0]][0].path}: {gates[0]} is a gate, so the checkpoint is already gated")
    config.architectures = ["GatedLlamaForCausalLM"]
    config.dtype = dtype = stored_dtype(checkpoint)
    notes = tuple(_config_notes(source_config))
    return Architecture(source_config, config, dtype, fused, unread, index_notes, notes)


def _config_notes(config: PreTrainedConfig) -> Iterator[str]:
    """Name the fields that a source's model ignores and Transformers' KV cache applies."""
    known = {field.name for field in fields(config)}
    for name in ("sliding_window", "attention_chunk_size"):
        value = getattr(config, name, None)
        if value is not None and name not in known:
            yield (
                f"config.json: {name}={value} is not read by a {config.model_type} model, but by Transformers' KV "
                f"cache: the source generates from the last {value} tokens alone, and the result from all; remove the "
                "field to make them agree"
            )


def read_gated_config(checkpoint: Checkpoint) -> GatedLlamaConfig:
    """
    Return the config of a gated checkpoint, checked against its tensors.

    Raises:
        ConversionError: if it is not a gated checkpoint, its gates are of a form that conversion doesn't write, or its
            tensors don't fit its config.
    """
    model_type = checkpoint.raw_config.get("model_type")
    with naming(checkpoint.config_path):
        if model_type != GatedLlamaConfig.model_type:
            raise ValueError(f"model_type must be {GatedLlamaConfig.model_type}, got {model_type!r}")
        config, converted = read_config(checkpoint), GatedLlamaConfig()
        assert isinstance(config, GatedLlamaConfig)
        for name in _OF_OTHER_VARIANTS:
            if (value := getattr(config, name)) != getattr(converted, name):
                raise ValueError(f"{name}={value!r} is not what conversion writes")
    _check_base_tensors(checkpoint, config, gates={name for name, _ in gate_tensor_shapes(config)})
    return config


def _options_of_fused(
    raw: dict[str, Any], config: PreTrainedConfig, fused: FusedGates, gate_options: dict[str, Any]
) -> dict[str, Any]:
    """Return the gate's fields for imported gates, which are the source's own."""
    for option, value in gate_options.items():
        if (option, value) != ("gate_granularity", fused.granularity):
            raise ValueError(f"has {fused.granularity} gates of its own, so {option}={value!r} does not apply")
    options = {"gate_granularity": fused.granularity, "gate_bias": config.attention_bias, "gate_scale": 1.0}
    if any(flag in raw for flag in AUTHORS_FLAGS.values()):
        options["use_qk_norm"] = raw.get("use_qk_norm", True)
    return options


def _check_base_tensors(
    checkpoint: Checkpoint,
    config: GatedLlamaConfig,
    fused: FusedGates | None = None,
    gates: Collection[str] = (),
) -> tuple[set[str], tuple[str, ...]]:
    """
    Return the names of the base tensors that the shards hold, and notes on the index.

    Raises:
        ConversionError: unless the checkpoint has all base tensors that the config asks for, and its index agrees about
            these, and about `gates`.
    """
    tensors = checkpoint.tensors()
    is_quantized = getattr(config, "quantization_config", None) is not None
    read: set[str] = set()
    quantized: set[str] = set()  # modules of which any tensor is read
    for name, shape in base_tensor_shapes(config):
        module, _, kind = name.rpartition(".")
        if is_quantized and module.endswith(LINEARS):
            module_tensors = [tensor for tensor in tensors if tensor.startswith(f"{module}.")]
            if kind == "weight" and not module_tensors:
                raise ConversionError(f"{checkpoint.directory}: config.json asks for {module}, which is {_IN_NO_SHARD}")
            stored = sum(tensors[tensor][1].size for tensor in module_tensors)
            if kind == "weight" and prod(shape) > 16 * stored:  # no scheme has less than half a bit for a weight
                raise ConversionError(
                    f"{checkpoint.directory}: config.json asks for {module} of shape {list(shape)}, "
                    f"which its {stored} bytes cannot hold"
                )
            read.update(module_tensors)
            quantized.add(module)
            continue
        if name not in tensors:
            raise ConversionError(f"{checkpoint.directory}: config.json asks for {name}, which is {_IN_NO_SHARD}")
        shard, stored_tensor = tensors[name]
        if fused is not None and ".self_attn.q_proj." in name:
            shape = (fused.rows, *shape[1:])
        if stored_tensor.shape != shape:
            raise ConversionError(
                f"{shard.path}: {name} has shape {list(stored_tensor.shape)}, config.json asks for {list(shape)}"
            )
        if stored_tensor.dtype not in FLOATING_DTYPES and not is_quantized:
            raise ConversionError(
                f"{shard.path}: {name} is {stored_tensor.dtype}, not among {', '.join(FLOATING_DTYPES)}"
            )
        read.add(name)
    # A tied checkpoint may store its head: Transformers then reads it.
    read |= {"lm_head.weight"} & tensors.keys()

    return read, check_index(checkpoint, lambda name: name in read or name in gates or _is_in(name, quantized))


def check_index_of_any(checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[str, ...]:
    """
    Return `check_index`'s notes on a checkpoint of any family or gated variant, whose tensors are not checked further.

    Args:
        checkpoint: the checkpoint.
        config: its config, with which a model can be built.
    """
    if not checkpoint.has_index:
        return ()
    # Here, as the rest of an extension needs no model of the config's size.
    from transformers import AutoModelForCausalLM

    import modeling_gated.registration  # noqa: F401 - makes the Auto classes know gated_llama

    plain = with_default_run_settings(config)
    plain.quantization_config = None
    with torch.device("meta"), naming(checkpoint.config_path):
        names = set(AutoModelForCausalLM.from_config(plain, trust_remote_code=False).state_dict())
    if config.tie_word_embeddings:
        names -= {"lm_head.weight"} - checkpoint.tensors().keys()
    quantized: set[str] = set()
    if getattr(config, "quantization_config", None) is not None:
        quantized = {module for name in names if (module := name.rpartition(".")[0]).endswith(LINEARS)}
    return check_index(checkpoint, lambda name: name in names or _is_in(name, quantized))


def _is_in(name: str, modules: Collection[str]) -> bool:
    """Return whether a tensor is in one of some modules, or in a part of one: quantization nests what it stores."""
    return bool(modules) and any(name[: dot.start()] in modules for dot in re.finditer(r"\.", name))

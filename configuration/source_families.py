"""Models that can be gated, and the gated model's config made from theirs."""

from collections.abc import Set as AbstractSet
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from .configuration_gated_llama import GatedLlamaConfig
from .gate_opening import open_gate


# What each source family leaves out of its config because its code fixes it.
SOURCE_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "ministral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False},
    "qwen3": {"use_qk_norm": True, "mlp_bias": False},
    "cwm": {"attention_bias": False},
    "internlm3": {},
    "iquestcoder": {},
    "seed_oss": {},
}
# Fields of source families that say nothing about the gated model: they are said in other fields, hold only for
# training (residual_dropout), or describe a q_proj with gates in it, which serving engines would then expect.
_OTHER_FIELDS = [
    "use_sliding_window",
    "max_window_layers",
    "attention_out_bias",
    "qkv_bias",
    "residual_dropout",
    "clip_qkv",
    "attn_output_gate",
    "headwise_attn_output_gate",
    "elementwise_attn_output_gate",
]


def check_source_family(model_type: object) -> None:
    """Raise ValueError unless `model_type`, as it stands in a config.json, is one of `SOURCE_FAMILIES`."""
    if model_type == "gated_llama":
        raise ValueError(f"model_type={model_type!r} is already gated")
    if not isinstance(model_type, str) or model_type not in SOURCE_FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not supported; supported are {', '.join(SOURCE_FAMILIES)}")


def gated_config(
    config_class: type[GatedLlamaConfig], config: PreTrainedConfig, gate_options: dict[str, Any]
) -> GatedLlamaConfig:
    """Return the config for `GatedLlamaConfig.from_source_config`, of the class on which that is called."""
    check_source_family(config.model_type)
    if config.is_heterogeneous:
        raise ValueError("per_layer_config: models whose layers differ in shape are not supported")
    architecture = _source_fields(config, {field.name for field in fields(config_class)})
    gated = config_class(**architecture | {"source_model_type": config.model_type} | gate_options)
    kind = gated.gate_activation, gated.gate_form, gated.gate_bias, gated.gate_logit_lse_weight
    if gated.gate_position and kind == ("sigmoid", "multiplicative", True, 0) and "gate_scale" not in gate_options:
        gated.gate_scale = open_gate(gated.gate_init)[1]
    return gated


def _source_fields(config: PreTrainedConfig, names: AbstractSet[str]) -> dict[str, Any]:
    """
    Return what a source's config says of the gated model's architecture: values of fields of the gated model's config.

    Args:
        config: config of the source, of one of `SOURCE_FAMILIES`.
        names: all fields that the gated model's config has.
    """
    family = config.model_type
    values = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    # A field that the family's config lacks is one that its model doesn't read, whatever a config.json says. Only
    # head_dim is read all the same, by Qwen2.
    unread = names - {read.name for read in fields(config)} - {"head_dim"}
    unread |= {"model_type", "architectures", "auto_map", "transformers_version", *_OTHER_FIELDS}
    output_bias = values.get("attention_out_bias") if family == "seed_oss" else None
    values = {name: value for name, value in values.items() if name not in unread} | SOURCE_FAMILIES[family]
    values.setdefault("attention_output_bias", values["attention_bias"] if output_bias is None else output_bias)
    return values

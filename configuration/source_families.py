# Copyright 2026 The GatedLlama authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which models can be gated, and what their configs say of the gated one.

A saved config carries this file's text inside its own.
"""

from collections.abc import Set as AbstractSet
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig


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


def source_fields(config: PreTrainedConfig, names: AbstractSet[str]) -> dict[str, Any]:
    """
    What a source's config says of the gated model's architecture: values of fields of the gated model's config.

    Args:
        config: the source's, of one of `SOURCE_FAMILIES`.
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

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
"""Configuration of GatedLlama: Llama with attention output gates (arXiv 2505.06708).

A saved config carries this file and the model's beside it, so it imports nothing that Transformers doesn't, but for
what is written into it then.
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal

import transformers
from packaging.version import Version


# Before more of Transformers is imported: an older one would fail for some name that it doesn't have.
if Version(transformers.__version__) < Version("5.16.1"):
    raise ImportError(f"GatedLlama needs transformers>=5.16.1, found {transformers.__version__}")

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging
from transformers.utils.type_validators import interval

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
"""How gates start: the bias that gives them their opening, and the scale with which an open gate is exactly 1.

A saved config carries this file's text inside its own.
"""

import math
from collections.abc import Iterator

import numpy as np


def initial_gate_bias(gate_init: float, gate_activation: str = "sigmoid", gate_form: str = "multiplicative") -> float:
    """
    The bias b, a bfloat16 number, with which a gate starts: activation(b) is `gate_init`, for additive gates 0.

    Raises:
        ValueError: if b does not exist, or the gate has no gradient there.
    """
    if gate_form == "additive":
        if gate_activation == "relu":
            raise ValueError(
                "gate_form='additive' with gate_activation='relu' and gate_bias=True: gates that add 0 at their start "
                "would have no gradient; with gate_bias=False they start at random"
            )
        return 0.0
    if gate_activation == "sigmoid":
        return open_gate(gate_init)[0]
    if gate_activation == "ns_sigmoid":
        if not 0.5 < gate_init < 1:
            raise ValueError(f"gate_init={gate_init} must lie between 0.5 and 1 for gate_activation='ns_sigmoid'")
        return open_gate(2 * gate_init - 1)[0]
    inverse = {"tanh": math.atanh, "silu": _inverse_silu}.get(gate_activation, float)
    bias = _to_bfloat16(inverse(gate_init))
    if bias == 0 or (gate_activation == "tanh" and np.tanh(np.float32(bias)) == 1):
        raise ValueError(
            f"gate_init={gate_init} is too close to {round(gate_init)} for gate_activation={gate_activation!r}"
        )
    return bias


def _inverse_silu(y: float) -> float:
    """The positive x for which x * sigmoid(x) = y."""
    x = y + 1.0
    for _ in range(20):  # Newton's steps: SiLU rises with a slope of at least 0.5 there
        sigmoid = 1 / (1 + math.exp(-x))
        x -= (x * sigmoid - y) / (sigmoid * (1 + x * (1 - sigmoid)))
    return x


def open_gate(gate_init: float) -> tuple[float, float]:
    """
    The bias b with which a gate starts open, and the scale s with which it then is the identity.

    b is logit(gate_init) rounded to bfloat16, or the nearest neighbour for which some float32 number s gives
    s * sigmoid(b) = 1 exactly in float32, for any exp that is right to one unit in the last place.

    Args:
        gate_init (`float`): the opening sigmoid(b) to start from, strictly between 0 and 1.

    Returns:
        `tuple[float, float]`: b and s. b is exact in bfloat16, float16 and float32, s in float32.

    Raises:
        ValueError: if gate_init is outside (0, 1), or so close to an end that a float32 sigmoid is 0 or 1 there.
    """
    if not 0 < gate_init < 1:
        raise ValueError(f"gate_init={gate_init} must be greater than 0 and smaller than 1")
    for bias in _bfloat16_around(math.log(gate_init / (1 - gate_init))):
        if (scale := _identity_scale(bias)) is not None:
            return bias, scale
    raise ValueError(f"gate_init={gate_init} is too close to {round(gate_init)}: a float32 sigmoid is flat there")


def _bfloat16_around(x: float) -> Iterator[float]:
    """The bfloat16 number nearest to x, then its neighbours; 0 for an x around which they lie too close to matter."""
    if abs(x) < 2**-8:
        yield 0.0
        return
    nearest = _bfloat16_bits(x)
    for step in range(16):
        for candidate in (nearest + step, nearest - step):
            yield float(np.uint32(candidate << 16).view(np.float32))


def _to_bfloat16(x: float) -> float:
    return float(np.uint32(_bfloat16_bits(x) << 16).view(np.float32))


def _bfloat16_bits(x: float) -> int:
    """The bits of the bfloat16 number nearest to x."""
    bits = int(np.float32(x).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # round half to even


def _identity_scale(bias: float) -> float | None:
    """The float32 number s for which s * 1 / (1 + e) = 1 for every e that a device may take for exp(-bias)."""
    if abs(bias) > 80:  # float32 exp overflows at 88
        return None
    exact = math.exp(-bias)
    nearest = np.float32(exact)
    # Vectorised exps are right to one unit in the last place; exp(0) = 1 is always exact.
    tolerance = 0.0 if float(nearest) == exact else float(np.spacing(nearest))
    around = (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf)))
    gates = [np.float32(1) / (np.float32(1) + e) for e in around if abs(float(e) - exact) <= tolerance]
    if not 0 < gates[0] < 1:
        return None
    scale = np.float32(1) / gates[0]
    for candidate in (scale, np.nextafter(scale, np.float32(0)), np.nextafter(scale, np.float32(np.inf))):
        if all(gate * candidate == 1 for gate in gates):
            return float(candidate)
    return None
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


logger = logging.get_logger(__name__)

if Version(transformers.__version__).release[:2] > (5, 23):
    logger.warning_once(f"GatedLlama was tested with transformers 5.16.1 to 5.23, found {transformers.__version__}")

# The paper's positions, and the name of the layer from which a position's gates come.
GATE_PROJECTIONS = {"G1": "g_proj", "G2": "g_v_proj", "G3": "g_k_proj", "G4": "g_q_proj", "G5": "g_o_proj"}


class _TensorParallelPlan:
    """
    The tensor-parallel style of each kind of layer that a config's model has; read from the class, of its defaults'.

    It follows the config's fields. What somebody assigns to a config goes before it, as it has no `__set__`.
    """

    def __get__(self, config: "GatedLlamaConfig | None", owner: type) -> dict[str, str]:
        plan = dict(LlamaConfig.base_model_tp_plan or {})
        if config is None:
            return plan | {"layers.*.self_attn.g_proj": "colwise"}
        if not config.use_glu:
            plan.pop("layers.*.mlp.gate_proj", None)
        # Gates of heads are split with the heads. Those that all heads share are whole on every rank, as is what G5's
        # are applied to.
        of_heads = "shared_gate" if config.gate_head_shared else "colwise"
        for position, name in GATE_PROJECTIONS.items():
            if position in config.gate_position:
                plan[f"layers.*.self_attn.{name}"] = "colwise_gather_output" if position == "G5" else of_heads
        norms = ["q_norm", "k_norm"] * config.use_qk_norm + ["o_norm"] * config.use_attention_output_norm
        return plan | {f"layers.*.self_attn.{norm}": "replicated_with_grad_allreduce" for norm in norms}


@strict
class GatedLlamaConfig(LlamaConfig):
    r"""
    Configuration of a [`GatedLlamaModel`]: a Llama, Mistral, Qwen2 or Qwen3 decoder whose attention blocks are gated,

        Y' = Y * gate_scale * sigmoid(X W + b)

    with X the attention block's input after the pre-norm and Y, by default, the attention output before `o_proj`
    ("Gated Attention for Large Language Models", arXiv 2505.06708, Section 2.2). The fields span the paper's design
    space, its baselines included.

    Gate:

    - **gate_position** (`list[str]`, defaults to `["G1"]`) -- What is gated, in the paper's numbers: any of `"G1"`, the
      attention output of each head, before `o_proj` (gates from `g_proj`); `"G2"`, the values (`g_v_proj`); `"G3"`,
      the keys (`g_k_proj`); `"G4"`, the queries (`g_q_proj`); `"G5"`, the output of `o_proj` (`g_o_proj`). Queries,
      keys and values are gated as they leave their projections, before QK-norm and RoPE. `[]` is the ungated baseline.
    - **gate_granularity** (`str`, defaults to `"headwise"`) -- `"headwise"`: one gate per head (for values and keys per
      key-value head), so `g_proj` has `num_attention_heads` rows. `"elementwise"`: one gate per channel of each head,
      `num_attention_heads * head_dim` rows; at G5, which has no heads, one per channel, `hidden_size` rows.
    - **gate_head_shared** (`bool`, defaults to `False`) -- Whether all heads share their gates: elementwise, `head_dim`
      rows; headwise, one gate per layer. Not for G5.
    - **gate_form** (`str`, defaults to `"multiplicative"`) -- `"multiplicative"`: Y' = Y * gate. `"additive"`:
      Y' = Y + gate, for activations that can be 0: `"silu"`, `"tanh"`, `"relu"` and `"linear"`.
    - **gate_activation** (`str`, defaults to `"sigmoid"`) -- `"sigmoid"`, `"ns_sigmoid"` (the paper's non-sparse
      sigmoid, 0.5 + 0.5 sigmoid), `"silu"`, `"tanh"`, `"relu"` or `"linear"` (the identity), computed in float32.
    - **gate_input_independent** (`bool`, defaults to `False`) -- Whether gates are parameters of the layer, the same
      for all tokens: Y' = Y * gate_scale * sigmoid(w), with one row of `g_proj.weight`, of shape [rows, 1], per gate.
      An optimizer that decays weights, and not biases, draws these towards 0.
    - **gate_bias** (`bool`, defaults to `True`) -- Whether gates have a bias b. With it they start at `gate_init`:
      W = 0 and sigmoid(b) = `gate_init`. Without it, W ~ N(0, `initializer_range`) and sigmoid gates start near 0.5,
      the paper's setting.
    - **gate_init** (`float`, defaults to 0.85) -- The activation of b at the start; strictly between 0 and 1, for
      `"ns_sigmoid"` between 0.5 and 1. b is a bfloat16 number, so a sigmoid gate starts within 0.004 of this value,
      below 0.4 within 0.015. Gates that a checkpoint lacks start so too. Additive gates start at 0 instead.
    - **gate_scale** (`float`, defaults to 1.0) -- The constant factor, positive. Conversion sets 1 / sigmoid(b), with
      which a gate that is still at its start is exactly 1.
    - **gate_dtype** (`str`, *optional*) -- `"float32"`: the gates' parameters are float32 whatever dtype the model is
      loaded in, so that their small updates don't round away: `from_pretrained(path, gate_dtype="float32")`.

    Attention:

    - **num_attention_heads** (`int`, defaults to 32) -- Query heads; a multiple of `num_key_value_heads`.
    - **num_key_value_heads** (`int`, *optional*) -- Key and value heads; `num_attention_heads` if not given.
    - **head_dim** (`int`, *optional*) -- Channels per head, even. If not given, `hidden_size / num_attention_heads`,
      which must then divide.
    - **attention_bias** (`bool`, defaults to `False`) -- Whether `q_proj`, `k_proj` and `v_proj` have biases.
    - **attention_output_bias** (`bool`, defaults to `False`) -- Whether `o_proj` has a bias.
    - **use_qk_norm** (`bool`, defaults to `False`) -- Whether queries and keys pass an RMSNorm over `head_dim`, as in
      Qwen3.
    - **use_attention_output_norm** (`bool`, defaults to `False`) -- Whether each head's attention output Y passes an
      RMSNorm over `head_dim`, with one weight for all heads, before it is gated.
    - **attention_output_activation** (`str`, *optional*) -- A function that is applied to Y itself, after that norm and
      before the gate: `"sigmoid"`, `"silu"`, `"tanh"` or `"relu"`. With `"silu"`, Y' = SiLU(Y).
    - **sliding_window** (`int`, *optional*) -- Tokens that a sliding layer's queries see; at least 1.
    - **layer_types** (`list[str]`, *optional*) -- `"full_attention"` or `"sliding_attention"` per layer. If not
      given, every layer slides when `sliding_window` is set, as in Mistral, and none otherwise. Layers that are all
      alike stay so when `num_hidden_layers` or `sliding_window` is changed later.
    - **attention_dropout** (`float`, defaults to 0.0) -- Dropout of the attention probabilities in training.
    - **rope_parameters** (`dict`, *optional*) -- RoPE in Transformers' form (`rope_type`, `rope_theta`, ...); a
      `rope_theta` of 10000 if not given.
    - **max_position_embeddings** (`int`, defaults to 2048) -- The longest sequence the model is meant for.

    Rest of the decoder, as in [`LlamaConfig`]:

    - **vocab_size** (32000), **hidden_size** (4096), **intermediate_size** (11008), **num_hidden_layers** (32): `int`,
      at least 1.
    - **use_glu** (`bool`, defaults to `True`) -- Whether the MLP is a gated linear unit, down(act(gate(x)) * up(x)), or
      plain, down(act(up(x))), without `gate_proj`.
    - **hidden_act** (`str`, defaults to `"silu"`) -- The MLP's activation, any name in Transformers' `ACT2FN`. The
      gated linear unit is GLU with `"sigmoid"`, GeGLU with `"gelu"`, ReGLU with `"relu"`, SwiGLU with `"silu"`.
    - **use_sandwich_norm** (`bool`, defaults to `False`) -- Whether the outputs of attention and MLP each pass an
      RMSNorm of their own, `post_self_attn_layernorm` and `post_mlp_layernorm`, before they are added, as in GLM-4.
    - **mlp_bias** (`bool`, defaults to `False`) -- Whether the MLP's projections have biases.
    - **rms_norm_eps** (`float`, defaults to 1e-6) -- Epsilon of every RMSNorm.
    - **initializer_range** (`float`, defaults to 0.02) -- Standard deviation of new weights, from 0 to 1.
    - **tie_word_embeddings** (`bool`, defaults to `False`) -- Whether `lm_head` shares the input embeddings.
    - **use_cache** (`True`), **bos_token_id** (1), **eos_token_id** (2), **pad_token_id** (`None`),
      **pretraining_tp** (1, unused): as in `LlamaConfig`.

    A value of the wrong type, or outside its range, raises an error that names the field and the value.

    ```python
    >>> config = GatedLlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2)
    >>> model = GatedLlamaForCausalLM(config)
    >>> model.model.layers[0].self_attn.g_proj.weight.shape
    torch.Size([9, 576])
    ```
    """

    model_type = "gated_llama"
    base_model_tp_plan = _TensorParallelPlan()

    attention_output_bias: bool = False
    use_qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    gate_position: list[str] = field(default_factory=lambda: ["G1"])
    gate_granularity: Literal["headwise", "elementwise"] = "headwise"
    gate_head_shared: bool = False
    gate_form: Literal["multiplicative", "additive"] = "multiplicative"
    gate_activation: Literal["sigmoid", "ns_sigmoid", "silu", "tanh", "relu", "linear"] = "sigmoid"
    gate_input_independent: bool = False
    gate_bias: bool = True
    gate_init: float = interval(min=0, max=1, exclude_min=True, exclude_max=True)(default=0.85)
    gate_scale: float | int = 1.0
    gate_dtype: Literal["float32"] | None = None
    use_attention_output_norm: bool = False
    attention_output_activation: Literal["sigmoid", "silu", "tanh", "relu"] | None = None
    use_sandwich_norm: bool = False
    use_glu: bool = True

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self._validate_sizes()
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of "
                    f"num_attention_heads={self.num_attention_heads}, so head_dim must be given"
                )
        if self.layer_types is None:
            layer_type = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [layer_type] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any):
        super().__setattr__(name, value)
        # As in Llama and Mistral, whose configs say nothing of single layers: from_pretrained(num_hidden_layers=2).
        layer_types = self.layer_types or []
        if name in ("num_hidden_layers", "sliding_window") and len(set(layer_types)) == 1:
            layer_type = layer_types[0]
            if name == "sliding_window":
                layer_type = "full_attention" if value is None else "sliding_attention"
            self.layer_types = [layer_type] * self.num_hidden_layers

    @classmethod
    def from_source_config(cls, config: PreTrainedConfig, **gate_options: Any) -> "GatedLlamaConfig":
        """
        The config of the gated model that has the architecture, and from its start the function, of `config`'s.

        Args:
            config ([`PreTrainedConfig`]):
                The ungated model's config, of one of `SOURCE_FAMILIES`. It is not changed.
            gate_options:
                Fields of the gate, such as `gate_granularity` and `gate_init`. Of sigmoid gates that multiply,
                `gate_scale` is 1 / sigmoid(b) unless given here. They, and additive gates, start as the identity if
                they have a bias; other gates, and fields that change the block, make the function another.

        Raises:
            ValueError: if `config.model_type` is of another family, or `config` overrides fields layer by layer.
        """
        check_source_family(config.model_type)
        if config.is_heterogeneous:
            raise ValueError("per_layer_config: models whose layers differ in shape are not supported")
        gated = cls(**source_fields(config, {own.name for own in fields(cls)}) | gate_options)
        kind = gated.gate_activation, gated.gate_form, gated.gate_bias
        if gated.gate_position and kind == ("sigmoid", "multiplicative", True) and "gate_scale" not in gate_options:
            gated.gate_scale = open_gate(gated.gate_init)[1]
        return gated

    def _validate_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the sizes fit together."""
        # Not LlamaConfig's: it ties hidden_size to the heads, which an explicit head_dim sets free.
        PreTrainedConfig.validate_architecture(self)
        self._validate_sizes()
        heads, key_value_heads, head_dim = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if key_value_heads is None or key_value_heads < 1:
            raise ValueError(f"num_key_value_heads={key_value_heads} must be at least 1")
        if head_dim is None or head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even and at least 2: RoPE turns channels in pairs")
        if heads % key_value_heads:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={key_value_heads}")

    def validate_attention_layers(self):
        """Part of `@strict`-powered validation: sliding layers have a window."""
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1")
        layer_types = self.layer_types or []
        for layer_type in layer_types:
            if layer_type not in ("full_attention", "sliding_attention"):
                raise ValueError(f"layer_types: {layer_type!r} is neither 'full_attention' nor 'sliding_attention'")
        if self.sliding_window is None and "sliding_attention" in layer_types:
            raise ValueError("layer_types has 'sliding_attention', but sliding_window=None")

    def validate_gate(self):
        """Part of `@strict`-powered validation: the gate is one that the model implements."""
        positions = self.gate_position
        if unknown := [position for position in positions if position not in GATE_PROJECTIONS]:
            raise ValueError(f"gate_position={positions}: {unknown[0]!r} is not among {', '.join(GATE_PROJECTIONS)}")
        if len(set(positions)) < len(positions):
            raise ValueError(f"gate_position={positions} names a position twice")
        if not positions:
            return
        if "G5" in positions and (self.gate_granularity != "elementwise" or self.gate_head_shared):
            raise ValueError(
                "gate_position has 'G5', the output of o_proj, which has no heads: it needs "
                f"gate_granularity='elementwise' and gate_head_shared=False, not {self.gate_granularity!r} and "
                f"{self.gate_head_shared}"
            )
        if (norm := self._norm_that_cancels_gates()) is not None:
            raise ValueError(
                f"gate_position={positions} with gate_granularity='headwise', "
                f"gate_head_shared={self.gate_head_shared} and {norm}=True: the norm divides by all that such a gate "
                "multiplies with, so that nothing but its sign is left"
            )
        if self.gate_form == "additive" and "sigmoid" in self.gate_activation:
            raise ValueError(
                f"gate_form='additive' with gate_activation={self.gate_activation!r}, which is never 0: additive gates "
                "are 'silu', 'tanh', 'relu' or 'linear'"
            )
        if self.gate_input_independent and not self.gate_bias:
            raise ValueError("gate_input_independent=True with gate_bias=False: such a gate is nothing but a bias")
        if not 0 < self.gate_scale < math.inf:
            raise ValueError(f"gate_scale={self.gate_scale} must be positive and finite")
        if self.gate_bias:
            initial_gate_bias(self.gate_init, self.gate_activation, self.gate_form)

    def _norm_that_cancels_gates(self) -> str | None:
        """The field of a norm over just those numbers that one gate multiplies, if any: it cancels the gate."""
        if self.gate_granularity != "headwise" or self.gate_form != "multiplicative":
            return None
        positions = set(self.gate_position)
        if self.use_qk_norm and positions & {"G3", "G4"}:
            return "use_qk_norm"
        # Gates of values that are the same for all tokens go through the sum over tokens.
        same_values = "G2" in positions and self.gate_input_independent
        if self.use_attention_output_norm and same_values:
            return "use_attention_output_norm"
        # One gate for all heads goes through o_proj, too.
        is_one_factor = "G1" in positions or (same_values and self.attention_output_activation is None)
        if self.use_sandwich_norm and self.gate_head_shared and is_one_factor and not self.attention_output_bias:
            return "use_sandwich_norm"
        return None

    def validate_hidden_act(self):
        """Part of `@strict`-powered validation: Transformers has the MLP's activation."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not among {', '.join(ACT2FN)}")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        Save `config.json` and, beside it, the two source files with which `trust_remote_code=True` loads the model
        where this package is not installed. Arguments are those of [`PreTrainedConfig.save_pretrained`].
        """
        # Transformers copies the file that each entry names into a folder of its own. With all of them naming one
        # file, there is one GatedLlamaConfig class.
        self.auto_map = {
            "AutoConfig": "modeling_gated_llama.GatedLlamaConfig",
            "AutoModel": "modeling_gated_llama.GatedLlamaModel",
            "AutoModelForCausalLM": "modeling_gated_llama.GatedLlamaForCausalLM",
            "AutoModelForQuestionAnswering": "modeling_gated_llama.GatedLlamaForQuestionAnswering",
            "AutoModelForSequenceClassification": "modeling_gated_llama.GatedLlamaForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_gated_llama.GatedLlamaForTokenClassification",
        }
        super().save_pretrained(save_directory)
        for name, source in _source_files():
            (Path(save_directory) / name).write_text(source, encoding="utf-8")
        if push_to_hub:  # not by the parent, which would upload before the source files are there
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: `save_pretrained` writes `auto_map`, and registering would change its `AutoConfig` entry."""


def _source_files() -> Iterator[tuple[str, str]]:
    """Name and text of the two source files of a checkpoint, with imports of each other as flat siblings."""
    modules = ("configuration_gated_llama", "modeling_gated_llama")

    def written_in(found: re.Match[str]) -> str:
        """What else is imported is no file of its own there: every checkpoint has the same two."""
        return found[0] if found[1] in modules else _source(found[1])

    for module in modules:
        source = re.sub(r"^from \.\w+\.(\w+) import", r"from .\1 import", _source(module), flags=re.MULTILINE)
        yield f"{module}.py", re.sub(r"^from \.(\w+) import .*\n", written_in, source, flags=re.MULTILINE)


def _source(module: str) -> str:
    package = __name__.rpartition(".")[0]
    # In the package the model lies one level up, in a checkpoint beside this file.
    specs = (importlib.util.find_spec(f"{parent}.{module}") for parent in (package, package.rpartition(".")[0]))
    origin = next(spec.origin for spec in specs if spec is not None and spec.origin is not None)
    return Path(origin).read_text(encoding="utf-8")


__all__ = ["GatedLlamaConfig"]

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

A checkpoint carries the files in `CARRIED_MODULES`. They import each other, and nothing that Transformers doesn't.
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import field
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

from .gate_opening import initial_gate_bias


logger = logging.get_logger(__name__)

NEWEST_TESTED_VERSION = "5.24"
TESTED_VERSIONS = f"5.16.1 to {NEWEST_TESTED_VERSION}"
RUNNING_VERSION = transformers.__version__
IS_TESTED_VERSION = Version(RUNNING_VERSION).release[:2] <= Version(NEWEST_TESTED_VERSION).release
if not IS_TESTED_VERSION:
    logger.warning_once(f"GatedLlama was tested with transformers {TESTED_VERSIONS}, found {RUNNING_VERSION}")

# Files that a checkpoint carries, and their modules in this package. Each imports only files before it.
CARRIED_MODULES = {
    "gate_opening_gated_llama.py": ".gate_opening",
    "configuration_gated_llama.py": ".configuration_gated_llama",
    "gate_functions_gated_llama.py": "..gate_functions",
    "kv_cache_gated_llama.py": "..kv_cache",
    "log_sum_exp_gated_llama.py": "..log_sum_exp",
    "lookups_gated_llama.py": "..lookups",
    "modeling_gated_llama.py": "..modeling_gated_llama",
}

# The paper's positions, and the name of the layer from which a position's gates come.
GATE_PROJECTIONS = {"G1": "g_proj", "G2": "g_v_proj", "G3": "g_k_proj", "G4": "g_q_proj", "G5": "g_o_proj"}


@strict
class GatedLlamaConfig(LlamaConfig):
    r"""
    Configuration of a [`GatedLlamaModel`]: a Llama, Mistral, Qwen2 or Qwen3 decoder whose attention blocks are gated,

        Y' = Y * gate_scale * sigmoid(X W + b)

    X is the attention block's input after the pre-norm. Y is, by default, the attention output before `o_proj`
    ("Gated Attention for Large Language Models", arXiv 2505.06708, Section 2.2).

    Gates:

    - **gate_granularity** (`str`, defaults to `"headwise"`) -- `"headwise"`: one gate per head, so `g_proj` has
      `num_attention_heads` rows. `"elementwise"`: one gate per channel of each head, so `g_proj` has
      `num_attention_heads * head_dim` rows.
    - **gate_init** (`float`, defaults to 0.85) -- The activation of b at the start; strictly between 0 and 1, for
      `"ns_sigmoid"` between 0.5 and 1. b is a bfloat16 number, so a sigmoid gate starts within 0.004 of this value,
      below 0.4 within 0.015. Gates that a checkpoint lacks start so too. Additive gates start at 0 instead.
    - **gate_scale** (`float`, defaults to 1.0) -- The constant factor, positive. Conversion sets 1 / sigmoid(b), with
      which a gate that is still at its start is exactly 1.
    - **gate_bias** (`bool`, defaults to `True`) -- Whether gates have a bias b. With it they start at `gate_init`:
      sigmoid(b) = `gate_init`, and each element of W is 2^-60, which is too small to change a gate, or 0 for additive
      gates and in float16. Without it, W ~ N(0, `initializer_range`) and sigmoid gates start near 0.5, the paper's
      setting.
    - **gate_logit_lse_weight** (`float`, defaults to 0.0) -- Weight, from 0 to 1, of the log-sum-exp (LSE) of the
      query's attention scores in the gate's logit: Y' = Y * gate_scale * sigmoid(X W + b + weight * LSE). With 1, the
      gate does exactly what an attention sink does. Headwise sigmoid gates of G1 alone; needs `attn_implementation`
      `"eager"`, `"sdpa"` or `"flex_attention"`.
    - **gate_dtype** (`str`, *optional*) -- `"float32"`: the gates' parameters are float32 whatever dtype the model is
      loaded in, so that their small updates don't round away: `from_pretrained(path, gate_dtype="float32")`.

    Attention:

    - **attention_bias** (`bool`, defaults to `False`) -- Whether `q_proj`, `k_proj` and `v_proj` have biases.
    - **attention_output_bias** (`bool`, defaults to `False`) -- Whether `o_proj` has a bias.
    - **use_qk_norm** (`bool`, defaults to `False`) -- Whether queries and keys pass an RMSNorm over `head_dim`, as in
      Qwen3.
    - **sliding_window** (`int`, *optional*) -- Tokens that a sliding layer's queries see; at least 1.
    - **layer_types** (`list[str]`, *optional*) -- `"full_attention"` or `"sliding_attention"` per layer. If not
      given, every layer slides when `sliding_window` is set, as in Mistral, and none otherwise. Layers that are all
      alike stay so when `from_pretrained` is given another `num_hidden_layers` or `sliding_window`.
    - **num_attention_heads** (`int`, defaults to 32) -- Query heads; a multiple of `num_key_value_heads`.
    - **num_key_value_heads** (`int`, *optional*) -- Key and value heads; `num_attention_heads` if not given.
    - **head_dim** (`int`, *optional*) -- Channels per head, even. If not given, `hidden_size / num_attention_heads`,
      which must then divide.
    - **rope_parameters** (`dict`, *optional*) -- RoPE in Transformers' form (`rope_type`, `rope_theta`, ...); a
      `rope_theta` of 10000 if not given.
    - **max_position_embeddings** (`int`, defaults to 2048) -- The longest sequence the model is meant for.
    - **attention_dropout** (`float`, defaults to 0.0) -- Dropout of the attention probabilities in training.

    Rest of the decoder, as in [`LlamaConfig`]:

    - **source_model_type** (`str`, *optional*) -- Model type that the checkpoint was converted from. `transformers
      serve` finds tool calls and reasoning as for that type.
    - **vocab_size** (32000), **hidden_size** (4096), **intermediate_size** (11008), **num_hidden_layers** (32): `int`,
      at least 1.
    - **hidden_act** (`str`, defaults to `"silu"`) -- The MLP's activation, any name in Transformers' `ACT2FN`. The
      gated linear unit is GLU with `"sigmoid"`, GeGLU with `"gelu"`, ReGLU with `"relu"`, SwiGLU with `"silu"`.
    - **mlp_bias** (`bool`, defaults to `False`) -- Whether the MLP's projections have biases.
    - **rms_norm_eps** (`float`, defaults to 1e-6) -- Epsilon of every RMSNorm.
    - **initializer_range** (`float`, defaults to 0.02) -- Standard deviation of new weights, from 0 to 1.
    - **tie_word_embeddings** (`bool`, defaults to `False`) -- Whether `lm_head` shares the input embeddings.
    - **use_cache** (`True`), **bos_token_id** (1), **eos_token_id** (2), **pad_token_id** (`None`),
      **pretraining_tp** (1, unused): as in `LlamaConfig`.

    Research variants of the paper, its baselines included:

    - **gate_position** (`list[str]`, defaults to `["G1"]`) -- What is gated, in the paper's numbers: any of `"G1"`, the
      attention output of each head, before `o_proj` (gates from `g_proj`); `"G2"`, the values (`g_v_proj`); `"G3"`,
      the keys (`g_k_proj`); `"G4"`, the queries (`g_q_proj`); `"G5"`, the output of `o_proj` (`g_o_proj`). Queries,
      keys and values are gated as they leave their projections, before QK-norm and RoPE. Headwise gates of values and
      keys are one per key-value head. G5 has no heads: its gates are elementwise, `hidden_size` rows. `[]` is the
      ungated baseline.
    - **gate_form** (`str`, defaults to `"multiplicative"`) -- `"multiplicative"`: Y' = Y * gate. `"additive"`:
      Y' = Y + gate, for activations that can be 0: `"silu"`, `"tanh"`, `"relu"` and `"linear"`.
    - **gate_activation** (`str`, defaults to `"sigmoid"`) -- `"sigmoid"`, `"ns_sigmoid"` (the paper's non-sparse
      sigmoid, 0.5 + 0.5 sigmoid), `"silu"`, `"tanh"`, `"relu"` or `"linear"` (the identity), computed in float32.
    - **gate_head_shared** (`bool`, defaults to `False`) -- Whether all heads share their gates: elementwise, `head_dim`
      rows; headwise, one gate per layer. Not for G5.
    - **gate_input_independent** (`bool`, defaults to `False`) -- Whether gates are parameters of the layer, the same
      for all tokens: Y' = Y * gate_scale * sigmoid(w), with one row of `g_proj.weight`, of shape [rows, 1], per gate.
      An optimizer that decays weights, and not biases, draws these towards 0.
    - **use_attention_output_norm** (`bool`, defaults to `False`) -- Whether each head's attention output Y passes an
      RMSNorm over `head_dim`, with one weight for all heads, before it is gated.
    - **attention_output_activation** (`str`, *optional*) -- A function that is applied to Y itself, after that norm and
      before the gate: `"sigmoid"`, `"silu"`, `"tanh"` or `"relu"`. With `"silu"`, Y' = SiLU(Y).
    - **use_sandwich_norm** (`bool`, defaults to `False`) -- Whether the outputs of attention and MLP each pass an
      RMSNorm of their own, `post_self_attn_layernorm` and `post_mlp_layernorm`, before they are added, as in GLM-4.
    - **use_glu** (`bool`, defaults to `True`) -- Whether the MLP is a gated linear unit, down(act(gate(x)) * up(x)), or
      plain, down(act(up(x))), without `gate_proj`.

    A value of the wrong type, or outside its range, raises an error that names the field and the value.

    ```python
    >>> config = GatedLlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2)
    >>> model = GatedLlamaForCausalLM(config)
    >>> model.model.layers[0].self_attn.g_proj.weight.shape
    torch.Size([9, 576])
    ```
    """

    model_type = "gated_llama"

    gate_granularity: Literal["headwise", "elementwise"] = "headwise"
    gate_init: float = interval(min=0, max=1, exclude_min=True, exclude_max=True)(default=0.85)
    gate_scale: float | int = 1.0
    gate_bias: bool = True
    gate_logit_lse_weight: float | int = 0.0
    gate_dtype: Literal["float32"] | None = None
    attention_output_bias: bool = False
    use_qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    source_model_type: str | None = None

    # Research variants of the paper.
    gate_position: list[str] = field(default_factory=lambda: ["G1"])
    gate_form: Literal["multiplicative", "additive"] = "multiplicative"
    gate_activation: Literal["sigmoid", "ns_sigmoid", "silu", "tanh", "relu", "linear"] = "sigmoid"
    gate_head_shared: bool = False
    gate_input_independent: bool = False
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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Make a config from a dict, with fields of `kwargs` in place of the dict's, as `from_pretrained` does.

        Layers of one type follow `num_hidden_layers` and `sliding_window`, as in Llama and Mistral.
        """
        overrides = {name: kwargs[name] for name in ("num_hidden_layers", "sliding_window") if name in kwargs}
        layer_types = config_dict.get("layer_types") or []
        if overrides and len(set(layer_types)) == 1:
            # None: derived from sliding_window.
            layer_types = None if "sliding_window" in overrides else layer_types[:1] * overrides["num_hidden_layers"]
            config_dict = config_dict | overrides | {"layer_types": layer_types}
        return super().from_dict(config_dict, **kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor-parallel style of each kind of layer in the model; an assigned plan replaces it."""
        if (assigned := vars(self).get("base_model_tp_plan")) is not None:
            return assigned
        left_out = () if self.use_glu else ("layers.*.mlp.gate_proj",)
        plan = {name: style for name, style in (LlamaConfig.base_model_tp_plan or {}).items() if name not in left_out}
        # Gates are split with their heads. Shared gates are whole on every rank, and so is what G5's are applied to.
        head_style = "shared_gate" if self.gate_head_shared else "colwise"
        for position in self.gate_position:
            style = "colwise_gather_output" if position == "G5" else head_style
            plan[f"layers.*.self_attn.{GATE_PROJECTIONS[position]}"] = style
        norms = ["q_norm", "k_norm"] * self.use_qk_norm + ["o_norm"] * self.use_attention_output_norm
        return plan | {f"layers.*.self_attn.{norm}": "replicated_with_grad_allreduce" for norm in norms}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str] | None) -> None:
        # Transformers before 5.23 adds tied embeddings to the plan. Saved configs leave this name out.
        vars(self)["base_model_tp_plan"] = plan

    @classmethod
    def from_source_config(cls, config: PreTrainedConfig, **gate_options: Any) -> "GatedLlamaConfig":
        """
        Return the config of the gated model that has the architecture, and from its start the function, of `config`'s.

        Args:
            config ([`PreTrainedConfig`]):
                The ungated model's config, of one of `SOURCE_FAMILIES`. It is not changed.
            gate_options:
                Fields of the gate, such as `gate_granularity` and `gate_init`. Of sigmoid gates that multiply,
                `gate_scale` is 1 / sigmoid(b) unless given here. They, and additive gates, start as the identity if
                they have a bias; other gates, and fields that change the block, make the function another.

        Raises:
            ValueError: if `config.model_type` is of another family, or `config` overrides fields layer by layer.
            ModuleNotFoundError: in code that a checkpoint carries, if this package is not installed.
        """
        # Not an import statement: Transformers loads no carried code without the packages that its statements name.
        families = importlib.import_module("modeling_gated.configuration.source_families")
        return families.gated_config(cls, config, gate_options)

    def _validate_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def validate_architecture(self):
        """Check, as part of `@strict` validation, that the sizes fit together."""
        # Not LlamaConfig's: it ties hidden_size to the heads, which an explicit head_dim sets free.
        PreTrainedConfig.validate_architecture(self)
        self._validate_sizes()
        heads, key_value_heads, head_dim = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if key_value_heads is None or key_value_heads < 1:
            raise ValueError(f"num_key_value_heads must be at least 1, got {key_value_heads}")
        if head_dim is None or head_dim < 2 or head_dim % 2:
            raise ValueError(
                f"head_dim must be even and at least 2, because RoPE turns channels in pairs, got {head_dim}"
            )
        if heads % key_value_heads:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={key_value_heads}")

    def validate_attention_layers(self):
        """Check, as part of `@strict` validation, that sliding layers have a window."""
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")
        layer_types = self.layer_types or []
        for layer_type in layer_types:
            if layer_type not in ("full_attention", "sliding_attention"):
                raise ValueError(f"layer_types: {layer_type!r} is neither 'full_attention' nor 'sliding_attention'")
        if self.sliding_window is None and "sliding_attention" in layer_types:
            raise ValueError("layer_types has 'sliding_attention', but sliding_window=None")

    def validate_gate(self):
        """Check, as part of `@strict` validation, that the model implements the gate."""
        positions = self.gate_position
        if unknown := [position for position in positions if position not in GATE_PROJECTIONS]:
            raise ValueError(
                f"gate_position must be among {', '.join(GATE_PROJECTIONS)}, got {unknown[0]!r} in {positions}"
            )
        if len(set(positions)) < len(positions):
            raise ValueError(f"gate_position must name each position once, got {positions}")
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
            raise ValueError(
                "gate_bias must be True with gate_input_independent=True, got False: such a gate is only a bias"
            )
        if not 0 < self.gate_scale < math.inf:
            raise ValueError(f"gate_scale must be positive and finite, got {self.gate_scale}")
        if not 0 <= self.gate_logit_lse_weight <= 1:
            raise ValueError(f"gate_logit_lse_weight must be between 0 and 1, got {self.gate_logit_lse_weight}")
        if self.gate_logit_lse_weight:
            needed = {"gate_granularity": "headwise", "gate_form": "multiplicative", "gate_activation": "sigmoid"}
            for name, value in (needed | {"gate_head_shared": False}).items():
                if (actual := getattr(self, name)) != value:
                    raise ValueError(f"{name} must be {value!r} with gate_logit_lse_weight, got {actual!r}")
            if "G1" not in positions:
                raise ValueError(f"gate_position must have 'G1' with gate_logit_lse_weight, got {positions}")
        if self.gate_bias:
            initial_gate_bias(self.gate_init, self.gate_activation, self.gate_form)

    def _norm_that_cancels_gates(self) -> str | None:
        """Return the field of a norm over just those numbers that one gate multiplies, if any: it cancels the gate."""
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
        """Check, as part of `@strict` validation, that Transformers has the MLP's activation."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not among {', '.join(ACT2FN)}")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        Save `config.json` and, next to it, the source files with which `trust_remote_code=True` loads the model where
        this package is not installed. Arguments are those of [`PreTrainedConfig.save_pretrained`].
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
        for name, source in carried_source_files():
            (Path(save_directory) / name).write_bytes(source.encode())
        if push_to_hub:  # not by the parent, which would upload before the source files are there
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: `save_pretrained` writes `auto_map`, and registering would change its `AutoConfig` entry."""


def carried_source_files() -> Iterator[tuple[str, str]]:
    """Yield name and text of each file in `CARRIED_MODULES`: this version's, but for the names in relative imports."""
    for name, module in CARRIED_MODULES.items():
        sibling = Path(__file__).with_name(name)  # in a checkpoint
        spec = None if sibling.is_file() else importlib.util.find_spec(module, __package__)
        source = Path(spec.origin if spec and spec.origin else sibling).read_text(encoding="utf-8")
        relative_import = r"^from \.(?:\w+\.)*(\w+?)(?:_gated_llama)? import"
        yield name, re.sub(relative_import, r"from .\1_gated_llama import", source, flags=re.MULTILINE)


__all__ = ["GatedLlamaConfig"]

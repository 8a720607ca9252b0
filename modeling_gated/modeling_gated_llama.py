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
"""GatedLlama: Llama with attention output gates (arXiv 2505.06708), as the difference from Transformers' own."""

from .configuration.configuration_gated_llama import GatedLlamaConfig, open_gate  # first: it checks versions


# isort: split

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


class GatedLlamaGate(nn.Linear):
    """The projection from hidden states to gate logits. A class of its own for `_init_weights` to recognise."""


class GatedLlamaAttention(LlamaAttention):
    """
    Llama's attention with a gate on its output: position G1 of arXiv 2505.06708, Section 2.2,

        Y' = Y * gate_scale * sigmoid(X W + b)

    X is `hidden_states` of shape [batch, seq, hidden_size], Y the output of scaled dot-product attention, of shape
    [batch, seq, num_attention_heads, head_dim]. The gate has one score per head or, elementwise, per channel.
    """

    def __init__(self, config: GatedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, hidden_size = config.num_attention_heads, config.hidden_size
        if config.attention_output_bias != config.attention_bias:
            self.o_proj = nn.Linear(heads * self.head_dim, hidden_size, bias=config.attention_output_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        is_sliding = config.layer_types[layer_idx] == "sliding_attention"  # type: ignore[index]  # None only as input
        self.sliding_window = config.sliding_window if is_sliding else None

        self.gate_scale = config.gate_scale
        self.gate_dim = 1 if config.gate_granularity == "headwise" else self.head_dim
        self.g_proj = GatedLlamaGate(hidden_size, heads * self.gate_dim, bias=config.gate_bias)

    def forward(  # type: ignore[override]  # Llama's annotations are narrower than its code
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )

        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )

        # Sigmoid and scale in float32: in bfloat16 a gate saturates, without gradient, from a logit of 6.25 on.
        gate = torch.sigmoid(self.g_proj(hidden_states).float()) * self.gate_scale
        gate = gate.to(attn_output.dtype).view(*input_shape, -1, self.gate_dim)
        attn_output = attn_output.reshape(hidden_shape) * gate

        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights


class GatedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: GatedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = GatedLlamaAttention(config, layer_idx)


class GatedLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: GatedLlamaConfig
    config_class = GatedLlamaConfig
    _no_split_modules = ["GatedLlamaDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": GatedLlamaDecoderLayer,
        "attentions": GatedLlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # Also called for gates that a checkpoint lacks: with the config of a converted one they are the identity.
        if isinstance(module, GatedLlamaGate) and module.bias is not None:
            bias, _ = open_gate(self.config.gate_init)
            init.zeros_(module.weight)
            init.constant_(module.bias, bias)
        else:
            super()._init_weights(module)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: the config's `save_pretrained` writes the code and `auto_map`, for every Auto class."""


class GatedLlamaModel(GatedLlamaPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: GatedLlamaConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [GatedLlamaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (config.layer_types or ())

        self.post_init()

    # Not Llama's: Qwen2's makes a mask for each of config.layer_types.
    forward = Qwen2Model.forward


class GatedLlamaForCausalLM(GatedLlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """The decoder with a language-modelling head, `lm_head`. Its forward is Llama's."""

    def __init__(self, config: GatedLlamaConfig):
        # Not LlamaForCausalLM's, which would build, and initialise, a whole Llama.
        PreTrainedModel.__init__(self, config)
        self.model = GatedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()


class GatedLlamaForSequenceClassification(GenericForSequenceClassification, GatedLlamaPreTrainedModel):
    """The decoder with a linear head, `score`, on each sequence's last token that is not padding."""


class GatedLlamaForTokenClassification(GenericForTokenClassification, GatedLlamaPreTrainedModel):
    """The decoder with dropout and a linear head, `score`, on every token."""


class GatedLlamaForQuestionAnswering(GenericForQuestionAnswering, GatedLlamaPreTrainedModel):
    """The decoder with a linear head, `qa_outputs`, on every token: the logits of an answer's start and end."""


# Here and not in the package alone: with code loaded by trust_remote_code, too, the last three build their decoder
# through AutoModel.
AutoModel.register(GatedLlamaConfig, GatedLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(GatedLlamaConfig, GatedLlamaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(GatedLlamaConfig, GatedLlamaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(GatedLlamaConfig, GatedLlamaForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(GatedLlamaConfig, GatedLlamaForQuestionAnswering, exist_ok=True)
# Trainer's label smoothing shifts the labels of the models in this table alone.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GatedLlamaConfig.model_type] = GatedLlamaForCausalLM.__name__


__all__ = [
    "GatedLlamaForCausalLM",
    "GatedLlamaForQuestionAnswering",
    "GatedLlamaForSequenceClassification",
    "GatedLlamaForTokenClassification",
    "GatedLlamaModel",
    "GatedLlamaPreTrainedModel",
]

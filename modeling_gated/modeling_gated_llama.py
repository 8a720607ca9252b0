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

from .configuration.configuration_gated_llama import (  # first: it checks versions
    GATE_PROJECTIONS,
    IS_TESTED_VERSION,
    RUNNING_VERSION,
    TESTED_VERSIONS,
    GatedLlamaConfig,
)


# isort: split

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from .configuration.gate_opening import initial_gate_bias, initial_gate_weight
from .gate_functions import GATE_ACTIVATIONS, RecomputedSigmoidGate, with_dtype
from .kv_cache import PASSES_KWARGS_TO_CACHE, check_cached_generation, forward_with_cache, take_cache
from .log_sum_exp import attend_with_log_sum_exp, check_backend
from .lookups import register_class_names, register_shared_gate_style


class GatedLlamaGate(nn.Linear):
    """
    The projection from hidden states, or from the constant 1 of shape [1, 1], to gate logits.

    `_init_weights` recognises the class. Its weights may be float32 in a model of another dtype.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(with_dtype(input, self.weight.dtype))


def gate_projection(config: GatedLlamaConfig, position: str, heads: int) -> GatedLlamaGate | None:
    """Return the projection to the gates of one of the paper's positions, or None if the position has no gates."""
    if position not in config.gate_position:
        return None
    assert config.head_dim  # the config has filled it in
    channels = config.hidden_size if position == "G5" else config.head_dim
    gates_of_head = 1 if config.gate_granularity == "headwise" else channels
    rows = gates_of_head if config.gate_head_shared else heads * gates_of_head
    dtype = torch.float32 if config.gate_dtype == "float32" else None
    if config.gate_input_independent:
        return GatedLlamaGate(1, rows, bias=False, dtype=dtype)
    return GatedLlamaGate(config.hidden_size, rows, bias=config.gate_bias, dtype=dtype)


class GatedLlamaAttention(LlamaAttention):
    """
    Llama's attention with gates, by default on its output: position G1 of arXiv 2505.06708, Section 2.2,

        Y' = Y * gate_scale * sigmoid(X W + b)

    X is `hidden_states` of shape [batch, seq, hidden_size], Y the output of scaled dot-product attention, of shape
    [batch, seq, num_attention_heads, head_dim]. Each gate is one number per head or, elementwise, per channel.

    The same holds at the paper's other positions, with Y the values (G2), keys (G3) or queries (G4) as they leave their
    projections, or the output of `o_proj` (G5); and for its other forms, with f = `gate_activation`:

        multiplicative          Y' = Y * gate_scale * f(X W + b)
        additive                Y' = Y + gate_scale * f(X W + b)
        head-shared             as these, with one W and b for all heads
        input-independent       as these, with X = 1 and no b
        score-aware             Y' = Y * gate_scale * sigmoid(X W + b + gate_logit_lse_weight * LSE)

    LSE is the log-sum-exp of the query's attention scores in a head. With a weight of 1, Y' / gate_scale is attention
    with one more key, whose value is 0 and whose score is -(X W + b). Before any gates, `use_attention_output_norm` and
    `attention_output_activation` change Y to RMSNorm(Y), over the channels of each head, and f(Y) (Table 3).

    The forward repeats Llama's, because `super().forward()` with the gates in `o_proj` fails in two ways. vLLM refuses
    a method whose source does not call the attention function. Engines that replace linear layers drop the gates.
    """

    signs_cache_receipts = True

    def __init__(self, config: GatedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, key_value_heads, hidden_size = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        assert key_value_heads  # the config has filled it in
        if config.attention_output_bias != config.attention_bias:
            self.o_proj = nn.Linear(heads * self.head_dim, hidden_size, bias=config.attention_output_bias)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        is_sliding = config.layer_types[layer_idx] == "sliding_attention"  # type: ignore[index]  # None only as input
        self.sliding_window = config.sliding_window if is_sliding else None

        self.o_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if config.use_attention_output_norm else None
        output_activation = config.attention_output_activation
        self.o_act_fn = GATE_ACTIVATIONS[output_activation] if output_activation is not None else None

        self.g_proj = gate_projection(config, "G1", heads)
        self.g_v_proj = gate_projection(config, "G2", key_value_heads)
        self.g_k_proj = gate_projection(config, "G3", key_value_heads)
        self.g_q_proj = gate_projection(config, "G4", heads)
        self.g_o_proj = gate_projection(config, "G5", 1)
        self.has_gated_projections = not {"G2", "G3", "G4"}.isdisjoint(config.gate_position)
        self.gate_act_fn = GATE_ACTIVATIONS[config.gate_activation]
        self.gate_scale = config.gate_scale
        self.gate_logit_lse_weight = config.gate_logit_lse_weight
        self.is_headwise = config.gate_granularity == "headwise"
        self.is_additive = config.gate_form == "additive"
        self.is_input_independent = config.gate_input_independent
        has_gate_per_channel = not (self.is_headwise or config.gate_head_shared or self.is_input_independent)
        self.recomputes_gates = has_gate_per_channel and config.gate_activation == "sigmoid"

    def gate_values(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 gates of the shape of their logits: [batch, seq, gates], or [1, gates]."""
        # float32: a bfloat16 sigmoid saturates, without a gradient, at 6.25.
        return self.gate_act_fn(logits.float()) * self.gate_scale

    def with_gates(self, states: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Apply gates, as `gate_values` returns them, to states [batch, seq, heads, channels]."""
        gates = with_dtype(gates, states.dtype).view(*gates.shape[:-1], -1, 1 if self.is_headwise else states.shape[-1])
        return states + gates if self.is_additive else states * gates

    def gate_logits(self, projection: nn.Module, gate_input: torch.Tensor, *log_sum_exp: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, seq, gates] or [1, gates], with the log-sum-exp [batch, seq, heads] if it is given."""
        logits = projection(gate_input)
        return logits + self.gate_logit_lse_weight * log_sum_exp[0] if log_sum_exp else logits

    def gated(
        self, states: torch.Tensor, projection: nn.Module | None, gate_input: torch.Tensor, *log_sum_exp: torch.Tensor
    ) -> torch.Tensor:
        """Apply the gates that `projection` computes from `gate_input` to states [batch, seq, heads, channels]."""
        if projection is None:
            return states
        logits = self.gate_logits(projection, gate_input, *log_sum_exp)
        # torch.compile decides on its own what to save and what to recompute.
        if self.recomputes_gates and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return RecomputedSigmoidGate.apply(states, logits.view(states.shape), self.gate_scale)
        return self.with_gates(states, self.gate_values(logits))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Not a parameter: its name depends on the version, and before 5.24 `cache` is for the attention function.
        cache, receipt = take_cache(kwargs), kwargs.pop("cache_receipt", None)
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        gate_input = hidden_states.new_ones(1, 1) if self.is_input_independent else hidden_states

        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        value_states = self.v_proj(hidden_states).view(hidden_shape)
        if self.has_gated_projections:
            query_states = self.gated(query_states, self.g_q_proj, gate_input)
            key_states = self.gated(key_states, self.g_k_proj, gate_input)
            value_states = self.gated(value_states, self.g_v_proj, gate_input)

        if self.q_norm is not None:
            query_states = self.q_norm(query_states)
        if self.k_norm is not None:
            key_states = self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        value_states = value_states.transpose(1, 2)

        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

        if cache is not None:
            options = {"kwargs": kwargs} if PASSES_KWARGS_TO_CACHE else {}
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, **options)
            if receipt is not None:
                receipt.is_signed = True

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )

        if self.gate_logit_lse_weight:
            attention_interface = partial(attend_with_log_sum_exp, attention_interface)

        attn_output, attn_weights, *log_sum_exp = attention_interface(
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

        attn_output = attn_output.reshape(hidden_shape)
        if self.o_norm is not None:
            attn_output = self.o_norm(attn_output)
        if self.o_act_fn is not None:
            attn_output = self.o_act_fn(attn_output)
        attn_output = self.gated(attn_output, self.g_proj, gate_input, *log_sum_exp)

        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        attn_output = self.o_proj(attn_output)
        if self.g_o_proj is not None:  # to the gates of G5 it is the output of one head
            attn_output = self.gated(attn_output.unsqueeze(-2), self.g_o_proj, gate_input).squeeze(-2)
        return attn_output, attn_weights


class GatedLlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's block with gated attention, or with `use_sandwich_norm` GLM-4's: x + RMSNorm(F(RMSNorm(x)))."""

    def __init__(self, config: GatedLlamaConfig, layer_idx: int):
        # Not LlamaDecoderLayer's, which would build an attention and an MLP of Llama's.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = GatedLlamaAttention(config, layer_idx)
        if config.use_glu:
            self.mlp: nn.Module = LlamaMLP(config)  # type: ignore[assignment]
        else:
            from transformers.models.arcee.modeling_arcee import ArceeMLP

            self.mlp = ArceeMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # One layer class for both, since FSDP looks for every class that _no_split_modules names.
        self.block_class: Any = LlamaDecoderLayer
        if config.use_sandwich_norm:
            from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer

            self.block_class = Glm4DecoderLayer
            self.post_self_attn_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_mlp_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward_with_cache(self.block_class.forward, self, hidden_states, *args, **kwargs)


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
        config = self.config
        if not isinstance(module, GatedLlamaGate) or not config.gate_bias:
            super()._init_weights(module)
            return
        bias = initial_gate_bias(config.gate_init, config.gate_activation, config.gate_form)
        # In gates that are independent of the input, the weights of its 1 are what a bias is elsewhere.
        init.constant_(module.weight, bias if module.bias is None else initial_gate_weight(config.gate_form))
        if module.bias is not None:
            init.constant_(module.bias, bias)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """Load a model as [`PreTrainedModel.from_pretrained`] does, after `run_self_test`."""
        run_self_test()  # before: the model is built on the meta device, where the self-test does not run
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: the config's `save_pretrained` writes the code and `auto_map`, for every Auto class."""


class GatedLlamaModel(GatedLlamaPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: GatedLlamaConfig):
        # Fields may have changed since the config was made: from_pretrained(path, gate_form="additive").
        config.validate_gate()
        run_self_test()
        if config.gate_head_shared:
            register_shared_gate_style()
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
        if config.gate_dtype == "float32":  # loaded so, too
            self._keep_in_fp32_modules_strict = {GATE_PROJECTIONS[position] for position in config.gate_position}

        self.post_init()
        if config.gate_logit_lse_weight:
            check_backend(self.config._attn_implementation)

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


def run_self_test() -> None:
    """Raise RuntimeError if this Transformers is newer than those tested and cached generation is wrong with it."""
    if not IS_TESTED_VERSION:
        check_cached_generation(GatedLlamaForCausalLM, GatedLlamaConfig, RUNNING_VERSION, TESTED_VERSIONS)


# Here and not in the package alone: with code loaded by trust_remote_code, too, the last three build their decoder
# through AutoModel.
AutoModel.register(GatedLlamaConfig, GatedLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(GatedLlamaConfig, GatedLlamaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(GatedLlamaConfig, GatedLlamaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(GatedLlamaConfig, GatedLlamaForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(GatedLlamaConfig, GatedLlamaForQuestionAnswering, exist_ok=True)
register_class_names(
    {
        "CAUSAL_LM": GatedLlamaForCausalLM,
        "SEQUENCE_CLASSIFICATION": GatedLlamaForSequenceClassification,
        "TOKEN_CLASSIFICATION": GatedLlamaForTokenClassification,
        "QUESTION_ANSWERING": GatedLlamaForQuestionAnswering,
    }
)


__all__ = [
    "GatedLlamaForCausalLM",
    "GatedLlamaForQuestionAnswering",
    "GatedLlamaForSequenceClassification",
    "GatedLlamaForTokenClassification",
    "GatedLlamaModel",
    "GatedLlamaPreTrainedModel",
]

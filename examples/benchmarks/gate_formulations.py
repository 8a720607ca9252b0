"""
Gate formulations of other implementations on Transformers' Llama, as baselines for gates.py.

Each formulation is Llama with another attention module. The attention output is gated as in Transformers' Qwen3-Next
and in the code of arXiv 2505.06708: attention(X) * sigmoid(X W), in the model's dtype, without bias and scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from modeling_gated.kv_cache import CACHE_ARGUMENT


class PeerAttention(LlamaAttention, ABC):
    """Attention with a sigmoid gate on its output [batch, tokens, heads, head_dim]. Subclasses compute the logits."""

    def __init__(self, config: LlamaConfig, layer_idx: int, gate_channels: int) -> None:
        super().__init__(config, layer_idx)
        self.heads, self.gate_channels = config.num_attention_heads, gate_channels

    @abstractmethod
    def queries_and_gates(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries [batch, tokens, heads, head_dim] and gate logits [batch, tokens, heads, gate_channels]."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.pop(CACHE_ARGUMENT, None)
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries, logits = self.queries_and_gates(hidden_states)
        queries = queries.transpose(1, 2)
        keys = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        values = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = interface(
            self, queries, keys, values, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        output = output.reshape(hidden_shape) * torch.sigmoid(logits)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class PlainGateAttention(PeerAttention):
    """Gates from a separate projection."""

    def __init__(self, config: LlamaConfig, layer_idx: int, gate_channels: int) -> None:
        super().__init__(config, layer_idx, gate_channels)
        self.g_proj = nn.Linear(config.hidden_size, self.heads * gate_channels, bias=False)

    def queries_and_gates(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries, logits = self.q_proj(hidden_states), self.g_proj(hidden_states)
        return queries.unflatten(-1, (self.heads, -1)), logits.unflatten(-1, (self.heads, -1))


class FusedGateAttention(PeerAttention):
    """Gates from rows of `q_proj`: for each group of heads, rows of queries and then rows of gates."""

    def __init__(self, config: LlamaConfig, layer_idx: int, gate_channels: int, groups: int) -> None:
        super().__init__(config, layer_idx, gate_channels)
        self.groups = groups
        rows = self.heads * (self.head_dim + gate_channels)
        self.q_proj = nn.Linear(config.hidden_size, rows, bias=config.attention_bias)

    def queries_and_gates(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        in_group = self.heads // self.groups
        rows = self.q_proj(hidden_states).unflatten(-1, (self.groups, -1))
        queries, logits = rows.split([in_group * self.head_dim, in_group * self.gate_channels], dim=-1)
        shape = (*hidden_states.shape[:-1], self.heads, -1)
        return queries.reshape(shape), logits.reshape(shape)


class Qwen3NextGateAttention(FusedGateAttention):
    """Gates from rows of `q_proj`, copied into a separate tensor. Queries are not copied."""

    def queries_and_gates(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries, logits = super().queries_and_gates(hidden_states)
        return queries, logits.flatten(-2).unflatten(-1, (self.heads, -1))


def qwen3_next(config: LlamaConfig, layer_idx: int) -> PeerAttention:
    """Return elementwise gates, each head's after its queries, as in Transformers' Qwen3-Next."""
    return Qwen3NextGateAttention(config, layer_idx, config.head_dim or 0, config.num_attention_heads)


def authors_elementwise(config: LlamaConfig, layer_idx: int) -> PeerAttention:
    """Return elementwise gates. Each key-value head has its heads' queries, then the gates, as in the paper's code."""
    return FusedGateAttention(config, layer_idx, config.head_dim or 0, config.num_key_value_heads or 0)


def authors_headwise(config: LlamaConfig, layer_idx: int) -> PeerAttention:
    """Return headwise gates. Each key-value head has its heads' queries, then the gates, as in the paper's code."""
    return FusedGateAttention(config, layer_idx, 1, config.num_key_value_heads or 0)


def plain_elementwise(config: LlamaConfig, layer_idx: int) -> PeerAttention:
    """Return elementwise gates from a separate projection."""
    return PlainGateAttention(config, layer_idx, config.head_dim or 0)


def plain_headwise(config: LlamaConfig, layer_idx: int) -> PeerAttention:
    """Return headwise gates from a separate projection."""
    return PlainGateAttention(config, layer_idx, 1)


PEERS: dict[str, Callable[[LlamaConfig, int], PeerAttention]] = {
    "plain-headwise": plain_headwise,
    "authors-headwise": authors_headwise,
    "plain-elementwise": plain_elementwise,
    "authors-elementwise": authors_elementwise,
    "qwen3-next": qwen3_next,
}

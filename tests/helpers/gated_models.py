"""Tiny gated models whose gates differ between tokens and heads, and what is left of a model without its attention."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import QuantizedLayer

import modeling_gated
from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM


SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "headwise": {},
    "elementwise": {"gate_granularity": "elementwise"},
    "sliding upper layers": {
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "QK-norm, tied": {"use_qk_norm": True, "tie_word_embeddings": True},
    "score-aware, sliding upper layers": {
        "gate_logit_lse_weight": 1.0,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}


# What each class's name ends in, and its Auto class.
HEADS = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


def gated_class(head: str) -> type[PreTrainedModel]:
    return getattr(modeling_gated, f"GatedLlama{head}")


def gated_model(
    variant: str = "headwise", model_class: type = GatedLlamaForCausalLM, **options: Any
) -> PreTrainedModel:
    """A model in evaluation mode with its gates off their start; `options` are fields of its config."""
    torch.manual_seed(0)
    model = model_class(GatedLlamaConfig(**SIZES | VARIANTS[variant] | options)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for gate in gates(model):
            for parameter in gate.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def gates(model: PreTrainedModel) -> list[nn.Linear]:
    return [layer.self_attn.g_proj for layer in model.base_model.layers]


def close_gates(model: PreTrainedModel) -> None:
    """Set every gate to exactly 0, in place."""
    with torch.no_grad():
        for gate in gates(model):
            gate.weight.zero_()
            gate.bias.fill_(-math.inf)


@torch.no_grad()
def without_attention(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The last hidden states of [batch, seq] tokens when no attention block adds anything: what closed gates leave."""
    hidden = model.base_model.embed_tokens(tokens)
    for layer in model.base_model.layers:
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.base_model.norm(hidden)


def greedy_without_attention(model: PreTrainedModel, token: int, length: int) -> list[int]:
    """What a model with closed gates generates after `token`: each time the best after the last token alone."""
    generated = []
    for _ in range(length):
        hidden = without_attention(model, torch.tensor([[token]]))
        generated.append(token := model.lm_head(hidden).argmax().item())
    return generated


class Int8Layer(QuantizedLayer):
    """Transformers' quantized cache with a rounding to 8 bits that needs no other library."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return q_tensor[0] * q_tensor[1]


def int8_cache(model: PreTrainedModel) -> Cache:
    """A cache that keeps the last 4 tokens whole."""
    return Cache(layers=[Int8Layer(residual_length=4) for _ in model.base_model.layers])

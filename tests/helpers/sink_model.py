"""A tiny Llama with an attention sink and a massive activation, built by hand, as pretrained models have them."""

import math
import re
from typing import Any

import torch
from transformers import LlamaForCausalLM

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny_configs import tiny_llama


BOS = 256
# Channels of the hidden state: what all tokens but the first have, what the first has, and where its spike is.
COMMON, FIRST, SPIKE = 0, 1, 2
# The neurons that write the spike and take it away, by layer.
WRITERS = {1: 3, 3: 5}
HEIGHT = 900.0


def sink_model(scale: float = 1.3) -> LlamaForCausalLM:
    """
    In layers 1 to 3 the queries of the first key-value head give most of their attention to the token `BOS`, in layer 0
    none does. From layer 1 to layer 3 a hidden state of it has a channel of about `HEIGHT`.
    """
    torch.manual_seed(0)
    config = tiny_llama(
        vocab_size=len(byte_tokenizer()),
        num_hidden_layers=4,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=BOS + 1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 / math.sqrt(parameter.shape[1]))
        embeddings = model.model.embed_tokens.weight
        embeddings.normal_(0, 1)
        embeddings[:, [COMMON, FIRST, SPIKE]] = torch.tensor([2.0, 0.0, 0.0])
        embeddings[BOS] *= 0.1
        embeddings[BOS, [COMMON, FIRST]] = torch.tensor([0.0, 4.0])
        model.lm_head.weight.normal_(0, 0.5)
        for number, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            attention.o_proj.weight[[COMMON, FIRST, SPIKE]] = 0
            mlp.down_proj.weight[[COMMON, FIRST, SPIKE]] = 0
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                projection.weight[:, [COMMON, FIRST, SPIKE]] = 0
            if number:
                _add_sink(attention, scale, SPIKE if number > 1 else FIRST)
            if number in WRITERS:
                _add_writer(mlp, WRITERS[number], FIRST if number == 1 else SPIKE, 1 if number == 1 else -1)
    return model


def _add_sink(attention: torch.nn.Module, scale: float, channel: int) -> None:
    """In the slowest channels of RoPE, whose angles hardly change over some hundred tokens."""
    size = attention.head_dim
    slow = [size // 2 - 1, size - 1]
    for head in range(attention.num_key_value_groups):
        attention.q_proj.weight[[head * size + place for place in slow], COMMON] = math.sqrt(scale)
    attention.k_proj.weight[slow, channel] = math.sqrt(scale) / 2
    attention.v_proj.weight[:size, channel] = 0.05


def _add_writer(mlp: torch.nn.Module, neuron: int, channel: int, sign: float) -> None:
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight[neuron] = 0
        projection.weight[neuron, channel] = 4.0
    mlp.down_proj.weight[:, neuron] = 0
    # What the neuron gives for a normed input that is this channel alone.
    largest = 4.0 * math.sqrt(mlp.hidden_size)
    mlp.down_proj.weight[SPIKE, neuron] = sign * HEIGHT / largest**2


def converted(source: LlamaForCausalLM, **fields: Any) -> GatedLlamaForCausalLM:
    """
    The gated model of a source, its gates 1, and with biases of all attention projections, which are 0. With other
    `fields` of its config it is another model, of the same weights.
    """
    fields |= {"attention_bias": True, "attention_output_bias": True}
    config = GatedLlamaConfig.from_source_config(source.config, **fields)
    model = GatedLlamaForCausalLM(config).eval().requires_grad_(False)
    tensors = source.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert all(re.search(r"bias$|\.(g_proj|q_norm|k_norm)\.|^lm_head\.", name) for name in missing)
    return model


def windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Bytes after `BOS`, token ids [count, length]."""
    tokens = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = BOS
    return tokens

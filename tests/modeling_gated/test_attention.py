"""The gated attention block against the equations of arXiv 2505.06708, Sections 2.1 and 2.2, in float64 NumPy."""

import numpy as np
import pytest
import torch

from modeling_gated import GatedLlamaConfig, GatedLlamaModel
from modeling_gated.modeling_gated_llama import GatedLlamaAttention


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """RoPE of [heads, seq, head_dim]: channels i and i + head_dim/2 turn by position * theta^(-2i/head_dim)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[-2])[:, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def gated_attention(x: np.ndarray, weights: dict[str, np.ndarray], config: GatedLlamaConfig, window: int) -> np.ndarray:
    """One sequence x, [seq, hidden_size], through projections, heads, softmax, gate and output, head by head."""

    def project(name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    seq, head_dim, heads = len(x), config.head_dim, config.num_attention_heads
    queries = project("q_proj").reshape(seq, heads, head_dim).transpose(1, 0, 2)
    keys = project("k_proj").reshape(seq, -1, head_dim).transpose(1, 0, 2)
    values = project("v_proj").reshape(seq, -1, head_dim).transpose(1, 0, 2)
    if config.use_qk_norm:
        queries = rms_norm(queries, weights["q_norm.weight"], config.rms_norm_eps)
        keys = rms_norm(keys, weights["k_norm.weight"], config.rms_norm_eps)
    theta = config.rope_parameters["rope_theta"]
    queries, keys = rotate(queries, theta), rotate(keys, theta)

    gate = config.gate_scale / (1 + np.exp(-project("g_proj")))  # [seq, heads] or [seq, heads * head_dim]
    gate = gate.reshape(seq, heads, -1)
    distance = np.arange(seq)[:, None] - np.arange(seq)
    outputs = []
    for head in range(heads):
        group = head // (heads // config.num_key_value_heads)
        scores = queries[head] @ keys[group].T / np.sqrt(head_dim)
        scores[(distance < 0) | (distance >= window)] = -np.inf
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        outputs.append(probabilities @ values[group] * gate[:, head])
    return np.concatenate(outputs, -1) @ weights["o_proj.weight"].T + weights.get("o_proj.bias", 0.0)


VARIANTS = {
    "headwise": {},
    "elementwise": {"gate_granularity": "elementwise"},
    "headwise, scaled": {"gate_scale": 1.25},
    "elementwise, no gate bias": {"gate_granularity": "elementwise", "gate_bias": False},
    "headwise, QK-norm": {"use_qk_norm": True},
    "headwise, all biases": {"attention_bias": True, "attention_output_bias": True},
    "elementwise, q, k, v biases": {"gate_granularity": "elementwise", "attention_bias": True},
    "elementwise, sliding": {"gate_granularity": "elementwise", "sliding_window": 5},
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_attention_follows_the_equations(variant: str, implementation: str) -> None:
    config = GatedLlamaConfig(
        vocab_size=16,
        hidden_size=40,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        **VARIANTS[variant],
    )
    model = GatedLlamaModel._from_config(config, attn_implementation=implementation).eval()
    attention = model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    seen = {}

    def record(_module: torch.nn.Module, _args: tuple, kwargs: dict, output: tuple) -> None:
        seen["inputs"], seen["outputs"] = kwargs["hidden_states"], output[0]

    attention.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(inputs_embeds=torch.randn(2, 12, 40, generator=generator))

    weights = {name: tensor.double().numpy() for name, tensor in attention.state_dict().items()}
    for x, found in zip(seen["inputs"], seen["outputs"], strict=True):
        expected = gated_attention(x.double().numpy(), weights, config, config.sliding_window or 12)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_the_gate_has_a_gradient_where_a_bfloat16_sigmoid_has_none() -> None:
    config = GatedLlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = GatedLlamaModel(config).to(torch.bfloat16)
    attention: GatedLlamaAttention = model.layers[0].self_attn
    with torch.no_grad():
        attention.g_proj.bias.fill_(7.5)
    assert torch.sigmoid(attention.g_proj.bias).eq(1).all()
    model(torch.arange(8)[None]).last_hidden_state.float().pow(2).mean().backward()
    assert torch.all(attention.g_proj.bias.grad != 0)

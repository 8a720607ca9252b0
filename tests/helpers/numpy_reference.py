"""A decoder block in float64 NumPy, head by head, from the equations of arXiv 2505.06708, Sections 2.1 and 2.2."""

import math
from collections.abc import Callable

import numpy as np

from modeling_gated import GatedLlamaConfig


Weights = dict[str, np.ndarray]

_erf = np.vectorize(math.erf)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str | None, Callable[[np.ndarray], np.ndarray]] = {
    None: lambda x: x,
    "linear": lambda x: x,
    "sigmoid": sigmoid,
    "ns_sigmoid": lambda x: 0.5 + 0.5 * sigmoid(x),
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + _erf(x / np.sqrt(2))) / 2,
}


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """RoPE of [seq, head_dim]: channels i and i + head_dim/2 turn by position * theta^(-2i/head_dim)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def project(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def apply_gate(
    y: np.ndarray, x: np.ndarray, weights: Weights, name: str, config: GatedLlamaConfig, head: int
) -> np.ndarray:
    """y, [seq, channels] of one head, with that head's gates, from the input x, [seq, hidden_size]."""
    logits = project(np.ones((1, 1)) if config.gate_input_independent else x, weights, name)
    scores = config.gate_scale * ACTIVATIONS[config.gate_activation](logits)
    of_head = y.shape[-1] if config.gate_granularity == "elementwise" else 1
    if not config.gate_head_shared:
        scores = scores[:, head * of_head : (head + 1) * of_head]
    assert scores.shape[-1] == of_head
    return y + scores if config.gate_form == "additive" else y * scores


def attention(x: np.ndarray, weights: Weights, config: GatedLlamaConfig) -> np.ndarray:
    """One sequence x, [seq, hidden_size], through projections, heads, softmax, gates and output, head by head."""
    seq, head_dim, eps = len(x), config.head_dim, config.rms_norm_eps
    theta = config.rope_parameters["rope_theta"]

    def heads_of(name: str, position: str, gate: str, norm: str | None) -> list[np.ndarray]:
        seen = []
        for head, y in enumerate(np.split(projected := project(x, weights, name), projected.shape[-1] // head_dim, -1)):
            if position in config.gate_position:
                y = apply_gate(y, x, weights, gate, config, head)
            if norm is not None and config.use_qk_norm:
                y = rms_norm(y, weights[f"{norm}.weight"], eps)
            seen.append(y if norm is None else rotate(y, theta))
        return seen

    queries = heads_of("q_proj", "G4", "g_q_proj", "q_norm")
    keys = heads_of("k_proj", "G3", "g_k_proj", "k_norm")
    values = heads_of("v_proj", "G2", "g_v_proj", None)
    distance = np.arange(seq)[:, None] - np.arange(seq)
    outputs = []
    for head, query in enumerate(queries):
        group = head // (len(queries) // len(keys))
        scores = query @ keys[group].T / np.sqrt(head_dim)
        scores[(distance < 0) | (distance >= (config.sliding_window or seq))] = -np.inf
        probabilities = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        y = probabilities @ values[group]
        if config.use_attention_output_norm:
            y = rms_norm(y, weights["o_norm.weight"], eps)
        y = ACTIVATIONS[config.attention_output_activation](y)
        if config.gate_logit_lse_weight == 1:  # the gate is one more key, of value 0 and score -logit
            logits = project(np.ones((1, 1)) if config.gate_input_independent else x, weights, "g_proj")[:, head]
            largest = np.maximum(scores.max(-1), -logits)
            others = np.exp(scores - largest[:, None]).sum(-1)
            y = y * (config.gate_scale * others / (others + np.exp(-logits - largest)))[:, None]
        elif "G1" in config.gate_position:
            y = apply_gate(y, x, weights, "g_proj", config, head)
        outputs.append(y)
    output = project(np.concatenate(outputs, -1), weights, "o_proj")
    if "G5" in config.gate_position:
        output = apply_gate(output, x, weights, "g_o_proj", config, 0)
    return output


def mlp(x: np.ndarray, weights: Weights, config: GatedLlamaConfig) -> np.ndarray:
    activation = ACTIVATIONS[config.hidden_act]
    up = project(x, weights, "up_proj")
    inner = activation(project(x, weights, "gate_proj")) * up if config.use_glu else activation(up)
    return project(inner, weights, "down_proj")


def decoder_layer(x: np.ndarray, weights: Weights, config: GatedLlamaConfig) -> np.ndarray:
    """One sequence x, [seq, hidden_size], through a block with weights of these names."""

    def of(module: str) -> Weights:
        return {name.removeprefix(f"{module}."): w for name, w in weights.items() if name.startswith(f"{module}.")}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, weights[f"{name}.weight"], config.rms_norm_eps)

    change = attention(norm(x, "input_layernorm"), of("self_attn"), config)
    x = x + (norm(change, "post_self_attn_layernorm") if config.use_sandwich_norm else change)
    change = mlp(norm(x, "post_attention_layernorm"), of("mlp"), config)
    return x + (norm(change, "post_mlp_layernorm") if config.use_sandwich_norm else change)

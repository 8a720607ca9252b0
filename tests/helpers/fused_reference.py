"""A decoder with the gates in `q_proj`, as the paper's authors released it, from their formulas and in float64."""

import math
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE on [seq, heads, head_dim], where channel i turns with channel i + head_dim / 2."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** -(torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def fused_logits(weights: dict[str, Tensor], config: dict[str, Any], tokens: Tensor, layout: str) -> Tensor:
    """
    Logits [seq, vocab] of one sequence.

    Args:
        weights: the checkpoint.
        config: its config.json, with `headwise_attn_output_gate` or `elementwise_attn_output_gate` set.
        tokens: ids [seq].
        layout: "grouped": a block per key-value head, of its queries and then its gates; "per head": a block per head.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, key_heads, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    eps, length = config["rms_norm_eps"], len(tokens)
    gate_dim = 1 if config.get("headwise_attn_output_gate") else dim
    blocks = key_heads if layout == "grouped" else heads
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."

        def linear(x: Tensor, name: str, p: str = p) -> Tensor:
            return x @ w[f"{p}{name}.weight"].T + w.get(f"{p}{name}.bias", 0.0)

        h = rms_norm(x, w[f"{p}input_layernorm.weight"], eps)
        fused = linear(h, "self_attn.q_proj").reshape(length, blocks, -1)
        q, gate = fused.split([heads // blocks * dim, heads // blocks * gate_dim], dim=-1)
        q, gate = q.reshape(length, heads, dim), gate.reshape(length, heads, gate_dim)
        k = linear(h, "self_attn.k_proj").reshape(length, key_heads, dim)
        v = linear(h, "self_attn.v_proj").reshape(length, key_heads, dim)
        if f"{p}self_attn.q_norm.weight" in w:
            q = rms_norm(q, w[f"{p}self_attn.q_norm.weight"], eps)
            k = rms_norm(k, w[f"{p}self_attn.k_norm.weight"], eps)
        q, k = rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"])
        k, v = (t.repeat_interleave(heads // key_heads, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
        out = torch.einsum("hij,jhd->ihd", scores, v) * torch.sigmoid(gate)
        x = x + linear(out.reshape(length, -1), "self_attn.o_proj")
        h = rms_norm(x, w[f"{p}post_attention_layernorm.weight"], eps)
        x = x + linear(torch.nn.functional.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T

"""RoPE and YaRN in float64 NumPy by the papers' formulas, the frequencies of models, and configs with every scaling."""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_gated import GatedLlamaConfig
from tests.helpers.source_models import LLAMA3_ROPE, SIZES
from tests.helpers.tiny_configs import tiny_llama


HEAD_DIM = SIZES["hidden_size"] // SIZES["num_attention_heads"]  # 8


def plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """RoPE's, in radians per token: theta^(-2i/d) of pair i."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def yarn_frequencies(theta: float, head_dim: int, factor: float, original: int, truncate: bool = True) -> np.ndarray:
    """YaRN's as in its authors' code: a ramp over pairs from the one that turns 32 times to the one that turns once."""
    plain = plain_frequencies(theta, head_dim)

    def pair(turns: int) -> float:
        # original * theta^(-2i/d) = 2 pi turns, solved for i
        return head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair(32), pair(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def yarn_frequencies_by_turns(theta: float, head_dim: int, factor: float, original: int) -> np.ndarray:
    """YaRN's as in the paper, arXiv 2309.00071, Eq. 18 and 19: a ramp over the number of turns r."""
    plain = plain_frequencies(theta, head_dim)
    gamma = np.clip((original * plain / (2 * np.pi) - 1) / (32 - 1), 0, 1)
    return (1 - gamma) * plain / factor + gamma * plain


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual / expected - 1).max())


def rotary_of(model: nn.Module) -> nn.Module:
    (actual,) = (module for module in model.modules() if isinstance(module, LlamaRotaryEmbedding))
    return actual


def frequencies(model: nn.Module) -> np.ndarray:
    return rotary_of(model).inv_freq.double().numpy()


def small_config(theta: float, head_dim: int, length: int) -> GatedLlamaConfig:
    """A config of a model that is nothing but its RoPE."""
    return tiny_llama(
        GatedLlamaConfig,
        head_dim=head_dim,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


def check_rotation(rotary: nn.Module, expected: np.ndarray, attention_factor: float) -> None:
    """What the module computes: cosines and sines of all angles, times the attention factor."""
    positions = np.array([0, 1, 7, 100, 2000])
    cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
    angles = np.tile(positions[:, None] * expected, 2)
    tolerance = attention_factor * (1e-6 + 1e-6 * positions[:, None])  # float32's angles err in proportion
    assert (np.abs(cos[0].double().numpy() - attention_factor * np.cos(angles)) < tolerance).all()
    assert (np.abs(sin[0].double().numpy() - attention_factor * np.sin(angles)) < tolerance).all()


def config_of(fields: dict[str, Any], through_llama: bool) -> PreTrainedConfig:
    """A gated config of the fields that a config.json may have."""
    fields = SIZES | fields
    if through_llama:
        return GatedLlamaConfig.from_source_config(LlamaConfig.from_dict(fields))
    return GatedLlamaConfig.from_dict(fields)


def yarn_of(length: int, original: int, **fields: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 5e5, "factor": length / original} | fields


SCALED: dict[str, tuple[dict[str, Any], int | None]] = {
    # and the length that the RoPE under the scaling was made for, if the config says so
    "yarn": ({"rope_parameters": yarn_of(256, 64, original_max_position_embeddings=64)}, 64),
    "llama3": ({"rope_parameters": LLAMA3_ROPE}, 64),
    "linear": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, None),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}}, 256),
    "longrope": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 5e5,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 128,
            }
        },
        128,
    ),
    "yarn, old spelling": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        64,
    ),
    "linear, old spelling": ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
    "dynamic, old spelling": ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 256),
    "llama3, old spelling": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"},
        },
        64,
    ),
}

"""Tiny ungated models of each family, with every parameter random, biases and norms too."""

from collections.abc import Callable

import torch
from transformers import (
    CwmConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# 9 heads of 8 channels as in SmolLM2 in small: a number of gates that no vector unit divides.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 72,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SOURCES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama, tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases, llama3 rope": lambda: LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, rope_parameters=dict(LLAMA3_ROPE)
    ),
    "mistral, sliding window": lambda: MistralConfig(**SIZES, sliding_window=8, head_dim=16),
    "mistral, full attention": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2, upper layers sliding": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen2, tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3, biases": lambda: Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "qwen3, tied": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "ministral, windows": lambda: MinistralConfig(
        **SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "cwm, biases in the MLP": lambda: CwmConfig(**SIZES, head_dim=8, sliding_window=8, mlp_bias=True),
    "seed_oss": lambda: SeedOssConfig(**SIZES, head_dim=16),
    "seed_oss, biases": lambda: SeedOssConfig(**SIZES, head_dim=8, attention_out_bias=True, mlp_bias=True),
}
if "internlm3" in CONFIG_MAPPING:  # from Transformers 5.23 on, as is iquestcoder
    SOURCES |= {
        "internlm3, biases": lambda: CONFIG_MAPPING["internlm3"](**SIZES, head_dim=8, qkv_bias=True, bias=True),
        "iquestcoder": lambda: CONFIG_MAPPING["iquestcoder"](**SIZES, head_dim=16),
    }


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter, those that start at 0 or 1 too, with numbers that show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))

"""Tiny ungated models of each family, with every parameter random, biases and norms too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)


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
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter, those that start at 0 or 1 too, with numbers that show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=list(SOURCES))
def source_config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return SOURCES[request.param]()


@pytest.fixture
def source_model(source_config: PreTrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(source_config)
    randomize(model)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two sequences of 33 tokens, none of them 0 (padding): more than any sliding window here."""
    return torch.randint(1, SIZES["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint in one file, with a side file."""
    model = AutoModelForCausalLM.from_config(SOURCES["llama, tied"]())
    randomize(model)
    model.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "llama"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint in several shards."""
    model = AutoModelForCausalLM.from_config(SOURCES["llama, biases, llama3 rope"]())
    randomize(model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"

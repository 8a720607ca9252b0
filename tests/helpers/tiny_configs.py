"""Configs of Llama's kind for models that train and generate within a second, where a test needs no other sizes."""

from typing import Any

from transformers import LlamaConfig


TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_llama(config_class: type = LlamaConfig, **changes: Any) -> Any:
    """Return a config of TINY sizes; `changes` are other sizes or other fields."""
    return config_class(**TINY | changes)

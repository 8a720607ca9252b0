"""Convert and load a checkpoint in the current folder with the package from a wheel."""

import pathlib

import torch
import transformers

import modeling_gated
from modeling_gated.conversion import convert_checkpoint


assert "wheel-environment" in modeling_gated.__file__, modeling_gated.__file__
config = transformers.Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
source = transformers.AutoModelForCausalLM.from_config(config)
source.save_pretrained("source")
convert_checkpoint("source", "gated")
gated = transformers.AutoModelForCausalLM.from_pretrained("gated")
tokens = torch.arange(64)[None]
assert torch.equal(gated(tokens).logits, source(tokens).logits)
assert pathlib.Path("gated/modeling_gated_llama.py").is_file()
print("the installed wheel converts and loads")

"""
Write the state dicts of two bfloat16 models, by the code in their checkpoints: `python load_gate_dtypes.py A B OUTPUT`.

A is loaded with float32 gates, B as its config says.
"""

import sys

import torch
from transformers import AutoModelForCausalLM


_, first, second, output = sys.argv
results = []
for path, options in ((first, {"gate_dtype": "float32"}), (second, {})):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.bfloat16, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    results.append(model.state_dict())
torch.save(results, output)

"""Print the gate biases of a model, by the code in its checkpoint: `python print_gate_biases.py CHECKPOINT`."""

import json
import sys

from transformers import AutoModelForCausalLM


model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([layer.self_attn.g_proj.bias.tolist() for layer in model.model.layers]))

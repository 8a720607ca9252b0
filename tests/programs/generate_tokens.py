"""Print the tokens that a checkpoint generates, by the code in it: `python generate_tokens.py CHECKPOINT`."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = model.generate(torch.arange(1, 25)[None], max_new_tokens=12, do_sample=False, eos_token_id=None)
print(json.dumps(tokens[0, 24:].tolist()))

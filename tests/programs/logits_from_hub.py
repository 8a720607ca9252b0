"""Write the logits of a model on the hub, by the code in its repository: `python logits_from_hub.py NAME OUTPUT`."""

import sys

import torch
from transformers import AutoModelForCausalLM


model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(1, 41)[None]).logits, sys.argv[2])

"""Write the logits of an adapter's model, by the code in its base: `python logits_of_adapter.py ADAPTER OUTPUT`."""

import sys

import torch
from peft import AutoPeftModelForCausalLM


model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(1, 41)[None]).logits, sys.argv[2])

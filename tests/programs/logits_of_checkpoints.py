"""
Write the logits of each checkpoint in a folder, by the code in it: `python logits_of_checkpoints.py FOLDER OUTPUT`.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


results = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        results[directory.name] = model(torch.arange(1, 41)[None]).logits
torch.save(results, sys.argv[2])

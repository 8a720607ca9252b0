"""
Run each checkpoint in a folder as one rank of tensor parallelism: `python tensor_parallel_rank.py FOLDER`.

Results are written next to the folder, one file per rank.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import modeling_gated  # noqa: F401 - registers the model type


root, results = Path(sys.argv[1]), {}
for directory in sorted(root.iterdir()):
    model = AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto")
    tokens = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        inference = model(tokens).logits
        generated = model.generate(tokens[:, :6], max_new_tokens=4, do_sample=False, eos_token_id=None)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    whole = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    split = sorted(n for n, p in model.named_parameters() if isinstance(p, DTensor) and p.to_local().shape != p.shape)
    computed = {"logits": inference, "generated": generated, "training": output.logits.detach()}
    results[directory.name] = computed | {"gradients": whole, "split": split}
torch.save(results, root.with_name(f"rank{torch.distributed.get_rank()}"))
torch.distributed.destroy_process_group()

"""
Train one step of FOLDER/model as one of two pipeline stages: `python pipeline_parallel_rank.py FOLDER`.

Like engines that read the plan, a rank replaces modules of the other rank by the identity. torch's schedule moves
hidden states and gradients. Logits and gradients are written to FOLDER, one file per rank.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers import AutoModelForCausalLM

import modeling_gated  # noqa: F401 - registers the model type


torch.distributed.init_process_group("gloo")
rank, root = torch.distributed.get_rank(), Path(sys.argv[1])
model: Any = AutoModelForCausalLM.from_pretrained(root / "model")
decoder, plans = model.base_model, (model.config.base_model_pp_plan, type(model)._pp_plan)
half = len(decoder.layers) // 2
first, *between, last = plans[0]
for name in between:
    decoder.set_submodule(name, decoder.get_submodule(name)[half * rank : half * (rank + 1)])
if rank == 0:
    decoder.set_submodule(last, nn.Identity())
    for name in plans[1]:
        model.set_submodule(name, nn.Identity())
else:
    decoder.set_submodule(first, nn.Identity())
decoder.config.num_hidden_layers = half


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids" if rank == 0 else "inputs_embeds": states}
        return self.model(**inputs, use_cache=False).logits


def loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


tokens = torch.arange(1, 25).view(2, 12)
schedule = ScheduleGPipe(PipelineStage(Part(), rank, 2, torch.device("cpu")), 2, loss_fn=loss)
output = schedule.step(*([tokens] if rank == 0 else []), target=tokens if rank == 1 else None)
gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
torch.save({"logits": output, "gradients": gradients}, root / f"rank{rank}")
torch.distributed.destroy_process_group()

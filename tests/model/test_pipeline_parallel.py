"""The plan for pipeline parallelism: two processes, each with its part of the model, compute what one does."""

from pathlib import Path

import pytest
import torch

from tests.helpers.gated_models import gated_model
from tests.helpers.two_ranks import run_two_ranks


# As engines do that read the plan: what another rank has is replaced by the identity. torch's schedule moves the rest.
RANK = """
import sys
from pathlib import Path
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers import AutoModelForCausalLM
import modeling_gated

torch.distributed.init_process_group("gloo")
rank, root = torch.distributed.get_rank(), Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(root / "model")
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
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, given):
        inputs = {"input_ids" if rank == 0 else "inputs_embeds": given}
        return self.model(**inputs, use_cache=False).logits

def loss(logits, tokens):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

tokens = torch.arange(1, 25).view(2, 12)
schedule = ScheduleGPipe(PipelineStage(Part(), rank, 2, torch.device("cpu")), 2, loss_fn=loss)
output = schedule.step(*([tokens] if rank == 0 else []), target=tokens if rank == 1 else None)
gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
torch.save({"logits": output, "gradients": gradients}, root / f"rank{rank}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_two_processes_compute_what_one_does(granularity: str, tmp_path: Path) -> None:
    model = gated_model(granularity, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    run_two_ranks(RANK, tmp_path, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)]

    tokens = torch.arange(1, 25).view(2, 12)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    torch.testing.assert_close(ranks[1]["logits"], output.logits, rtol=1e-4, atol=1e-4)
    half = len(model.model.layers) // 2
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = dict(ranks[0]["gradients"])
    for name, gradient in ranks[1]["gradients"].items():
        parts = name.split(".")
        if parts[1] == "layers":  # counted from 0 in each part
            parts[2] = str(int(parts[2]) + half)
        found[".".join(parts)] = gradient
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name

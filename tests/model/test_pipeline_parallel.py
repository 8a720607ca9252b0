"""The plan for pipeline parallelism: two processes, each with its part of the model, compute what one does."""

from pathlib import Path

import pytest
import torch

from tests.helpers.gated_models import gated_model
from tests.helpers.processes import run_two_ranks


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_two_processes_compute_what_one_does(granularity: str, tmp_path: Path) -> None:
    model = gated_model(granularity, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    run_two_ranks("pipeline_parallel_rank.py", tmp_path, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)]

    tokens = torch.arange(1, 25).view(2, 12)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    torch.testing.assert_close(ranks[1]["logits"], output.logits, rtol=1e-4, atol=1e-4)
    half = len(model.model.layers) // 2
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    actual = dict(ranks[0]["gradients"])
    for name, gradient in ranks[1]["gradients"].items():
        parts = name.split(".")
        if parts[1] == "layers":  # counted from 0 in each part
            parts[2] = str(int(parts[2]) + half)
        actual[".".join(parts)] = gradient
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name

"""Tensor parallelism over two processes: every variant's plan gives the logits and gradients of one process."""

import re

import pytest
import torch

from tests.helpers.paper_variants import CONFIGS, random_model
from tests.helpers.processes import run_two_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes computed of every variant."""
    root = tmp_path_factory.mktemp("tensor parallel")
    for name in CONFIGS:
        random_model(name).save_pretrained(root / "models" / name)
    run_two_ranks("tensor_parallel_rank.py", root, root / "models")
    return [torch.load(root / f"rank{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_two_processes_compute_what_one_does(name: str, ranks: list[dict]) -> None:
    model = random_model(name)
    tokens = torch.arange(1, 25).view(2, 12)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    generated = model.generate(tokens[:, :6], max_new_tokens=4, do_sample=False, eos_token_id=None)
    for rank in ranks:
        actual = rank[name]
        torch.testing.assert_close(actual["logits"], output.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual["training"], output.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(actual["generated"], generated)
        for parameter_name, parameter in model.named_parameters():
            scale = parameter.grad.abs().max()
            difference = (actual["gradients"][parameter_name] - parameter.grad).abs().max()
            assert difference < 1e-3 * scale, parameter_name


@pytest.mark.parametrize("name", list(CONFIGS))
def test_gates_are_split_with_their_heads(name: str, ranks: list[dict]) -> None:
    """But for those that all heads share, which every rank holds; and no rule is for a layer that is not there."""
    config = CONFIGS[name]
    modules = {re.sub(r"\d+", "*", path) for path, _ in random_model(name).named_modules()}
    assert {f"model.{rule}" for rule in config.base_model_tp_plan} <= modules
    projections = {"G1": "g_proj", "G2": "g_v_proj", "G3": "g_k_proj", "G4": "g_q_proj", "G5": "g_o_proj"}
    expected = set() if config.gate_head_shared else {projections[position] for position in config.gate_position}
    actual = {parameter.split(".")[-2] for parameter in ranks[0][name]["split"]}
    assert {module for module in actual if module.startswith("g_")} == expected

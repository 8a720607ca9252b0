"""The loop that goes on where it was: when it ends early, and what it writes down."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader

from modeling_gated.training.loop import (
    Evaluation,
    Run,
    Stage,
    check_run_settings,
    has_ended,
    make_accelerator,
    read_losses,
    train,
)


@dataclass
class TinySchedule:
    length: int = 4
    steps: int = 20
    batch_size: int = 2
    learning_rate: float = 0.1


class Numbers:
    """Windows that are their own numbers."""

    def training_batch(self, length: int, first: int, count: int, seed: int) -> torch.Tensor:
        return torch.arange(first, first + count)[:, None].expand(-1, length)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return (self.weight - windows.float().mean() / 10).square().sum()


@pytest.fixture(autouse=True)
def own_accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trained(output: Path, evaluation: Evaluation | None, save_every: int = 5, accumulated: int = 1) -> nn.Module:
    output.mkdir(exist_ok=True)
    accelerator = make_accelerator("no", accumulated)
    run = Run(output, accelerator, Numbers(), output, 2, accumulated, save_every, 0, progress=False)
    module = Loss()
    return train(run, module, [{"params": list(module.parameters())}], Stage("short", TinySchedule(), evaluation))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("losses", "ended"),
    [
        ([], False),
        ([3.0, 2.0, 1.0], False),
        ([1.0, 2.0], False),
        ([1.0, 2.0, 3.0], True),
        ([1.0, 1.0, 1.0], True),
        ([1.0, 2.0, 0.5], False),
        ([2.0, 1.0, 3.0, 0.9], False),
    ],
)
def test_when_enough_is_enough(losses: list[float], ended: bool) -> None:
    """After two that are no lower than the lowest before."""
    assert has_ended(losses, 2) == ended


@pytest.mark.fast
def test_training_ends_when_held_out_losses_do_not_fall(tmp_path: Path) -> None:
    losses = iter([5.0, 4.0, 4.5, 4.2, 1.0])
    trained(tmp_path, Evaluation(lambda module: next(losses), every=3, patience=2))
    assert read_losses(tmp_path, "short", "held_out") == [5.0, 4.0, 4.5, 4.2]
    assert len(read_losses(tmp_path, "short")) == 12


def test_what_is_gone_on_from_keeps_its_held_out_losses(tmp_path: Path) -> None:
    def interrupting(losses: list[float], at: int):
        def loss(module: nn.Module) -> float:
            losses.append(module(torch.zeros(1, 1)).item())
            if len(losses) == at:
                raise KeyboardInterrupt
            return losses[-1]

        return Evaluation(loss, every=2, patience=9)

    whole, parts = [], []
    expected = trained(tmp_path / "whole", interrupting(whole, 0))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", interrupting(parts, 4))
    AcceleratorState._reset_state(reset_partial_state=True)
    actual = trained(tmp_path / "parts", interrupting([], 0))
    assert torch.equal(actual.weight, expected.weight)
    for kind in ("losses", "held_out"):
        assert read_losses(tmp_path / "parts", "short", kind) == read_losses(tmp_path / "whole", "short", kind)


def test_without_an_evaluation_all_steps_are_taken(tmp_path: Path) -> None:
    trained(tmp_path, None)
    assert len(read_losses(tmp_path, "short")) == 20
    assert read_losses(tmp_path, "short", "held_out") == []


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    check_run_settings({"seed": 1}, tmp_path / "run")
    check_run_settings({"seed": 1}, tmp_path / "run")
    with pytest.raises(ValueError, match=r"seed must be 1, .*got 2"):
        check_run_settings({"seed": 2}, tmp_path / "run")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="must be empty or the output of such a run"):
        check_run_settings({"seed": 1}, tmp_path)


def test_another_training_s_data_loader_does_not_count(tmp_path: Path) -> None:
    """A loop that takes its last batch and leaves (a Trainer at max_steps) never tells accelerate that it has ended."""
    expected = trained(tmp_path / "first", None, accumulated=2).weight
    loader = Accelerator(cpu=True).prepare(DataLoader(torch.arange(2)))
    batches = iter(loader)
    next(batches), next(batches)
    assert GradientState().end_of_dataloader
    assert torch.equal(trained(tmp_path / "second", None, accumulated=2).weight, expected)
    batches.close()

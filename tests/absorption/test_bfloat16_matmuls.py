"""Products in bfloat16: where they are taken, how near they come, and that the report says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_gated.absorption import AbsorptionSettings, absorb, absorb_checkpoint, work
from modeling_gated.absorption.bfloat16_matmuls import has_bfloat16_matmuls, matmuls_in_bfloat16
from modeling_gated.absorption.distillation.loss import SinkDistillation
from modeling_gated.absorption.edit.layer_states import LayerStates
from modeling_gated.absorption.edit.sinks import SinkDirection, layer_sinks
from modeling_gated.conversion import convert_checkpoint
from modeling_gated.training import ungated
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.sink_model import converted, sink_model, windows


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, False), ({"avx512_f": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True)],
)
def test_a_cpu_says_whether_it_has_them(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16_matmuls() == expected


def test_a_pytorch_that_cannot_say_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bfloat16_matmuls()


def test_layers_are_near_and_what_is_kept_is_float32() -> None:
    batches = windows(4, 40).split(2)
    exact, mixed = (
        LayerStates(converted(sink_model()), batches, bfloat16_matmuls=is_bfloat16) for is_bfloat16 in (False, True)
    )
    for _ in range(4):
        sinks, others = layer_sinks(exact), layer_sinks(mixed)
        for one, other in zip(sinks.outputs, others.outputs, strict=True):
            assert other.dtype == torch.float32
            assert 0 < (one - other).norm() < 0.02 * one.norm()
        exact.advance()
        mixed.advance()
    assert all(states.dtype == torch.float32 for states in mixed.states)


def test_the_loss_is_near_and_its_gradient_float32() -> None:
    """And sinks are the same, as they are found in float32."""
    tokens = windows(2, 32, seed=1)
    states, directions = LayerStates(converted(sink_model()), windows(8, 48).split(4)), []
    for _ in range(4):
        directions.append(layer_sinks(states).direction)
        states.advance()
    actual: dict[bool, tuple[torch.Tensor, ...]] = {}
    for is_bfloat16 in (False, True):
        student = converted(sink_model(scale=0.9))
        trained = student.base_model.layers[2].self_attn.q_proj.weight.requires_grad_(True)
        teacher = ungated(converted(sink_model()), share_weights=False)
        distillation = SinkDistillation(
            student,
            teacher,
            [None, *directions[1:]],
            sink_weight=1.0,
            hidden_weight=1.0,
            hidden_limit=500.0,
            rows=32,
            bfloat16_matmuls=is_bfloat16,
        )
        actual[is_bfloat16] = distillation.terms(tokens)
        torch.stack(actual[is_bfloat16]).sum().backward()
        assert trained.grad is not None
        assert trained.grad.dtype == torch.float32
    for exact, near in zip(actual[False], actual[True], strict=True):
        assert near.dtype == torch.float32
        assert 0 < abs(near - exact) < 0.05 * exact


def test_sinks_are_found_in_float32() -> None:
    direction = SinkDirection(torch.ones(4), torch.tensor([1000.0, -1000.0, 1.0, 0.0]))
    inputs = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.1001, 0.1, 0.0, 0.0], [0.10033, 0.1, 0.0, 0.0]]])
    with matmuls_in_bfloat16(True):
        assert direction.tokens(inputs).tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("has_them", "dtype", "products"),
    [(True, None, "bfloat16"), (False, None, "float32"), (True, torch.float32, "float32")],
)
def test_the_report_says_what_was_multiplied_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_them: bool, dtype: torch.dtype | None, products: str
) -> None:
    """Bfloat16 where the CPU has it, unless another dtype is asked for; models are measured without."""
    monkeypatch.setattr(absorb, "has_bfloat16_matmuls", lambda: has_them)
    seen: dict[str, set[torch.dtype]] = {}
    steps = ["sampling"]
    forward = torch.nn.Linear.forward

    def watched(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        output = forward(module, states)
        seen.setdefault(steps[-1], set()).add(output.dtype)
        return output

    def begins(name: str) -> None:
        step = getattr(work, name)

        def begun(*arguments: Any, **options: Any) -> Any:
            steps.append(name)
            return step(*arguments, **options)

        monkeypatch.setattr(work, name, begun)

    for name in ("absorb_sinks", "distil", "prove"):
        begins(name)
    sink_model().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")  # before: it tries its config in float32
    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    settings = AbsorptionSettings(
        distill_tokens=256,
        sample_tokens=64,
        calibration_tokens=256,
        window_tokens=64,
        refinement_epochs=1,
        measured_windows=1,
    )
    absorb_checkpoint(tmp_path / "gated", tmp_path / "out", settings=settings, dtype=dtype)
    report = json.loads((tmp_path / "out" / "absorption.json").read_text(encoding="utf-8"))
    assert (report["dtype"], report["products"]) == ("float32", products)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| computed in | float32, matmuls in {products} |" in card
    expected = getattr(torch, products)
    assert (seen["sampling"], seen["distil"], seen["prove"]) == ({expected}, {expected}, {torch.float32})
    assert expected in seen["absorb_sinks"]  # which looks for writers in float32

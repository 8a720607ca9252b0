"""What the edited model is trained to make small, against float64 NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling_gated.absorption import AbsorptionError, AbsorptionSettings
from modeling_gated.absorption.distillation.loss import SinkDistillation
from modeling_gated.absorption.distillation.training import _validation_windows, distil
from modeling_gated.absorption.edit.layer_states import LayerStates
from modeling_gated.absorption.edit.sinks import layer_sinks
from modeling_gated.absorption.texts import Text
from modeling_gated.training import ungated
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.sink_model import converted, sink_model, windows


@pytest.fixture(scope="module")
def sinks() -> list[Any]:
    """Each layer's of the original."""
    states, actual = LayerStates(converted(sink_model()), windows(8, 48).split(4)), []
    for _ in range(4):
        actual.append(layer_sinks(states))
        states.advance()
    return actual


@torch.no_grad()
def hidden_states(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """After each layer, [layers, batch, tokens, hidden_size]."""
    seen: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda *call: seen.append(call[-1])) for layer in model.base_model.layers]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).double().numpy()


def log_probabilities(model: Any, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.fast
@pytest.mark.parametrize(("limit", "teachers_own_counts"), [(500.0, False), (0.01, True)])
def test_the_loss(sinks: list[Any], limit: float, teachers_own_counts: bool) -> None:
    """KL divergence, attention to sinks in the layers that have some, and hidden states above the limit."""
    student, tokens = converted(sink_model(scale=0.9)), windows(2, 32, seed=1)
    teacher = ungated(converted(sink_model()), share_weights=False)
    directions = [None, *(layer.direction for layer in sinks[1:])]
    distillation = SinkDistillation(
        student, teacher, directions, sink_weight=2.0, hidden_weight=3.0, hidden_limit=limit, rows=32
    )
    with torch.no_grad():
        divergence, mass, excess = distillation.terms(tokens)
        loss = distillation(tokens)
    expected, actual = log_probabilities(teacher, tokens), log_probabilities(student, tokens)
    np.testing.assert_allclose(divergence, (np.exp(expected) * (expected - actual)).sum(-1).mean(), rtol=1e-4)

    student.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = student(tokens, output_attentions=True, use_cache=False).attentions
    to_first = torch.stack(attentions[1:])[..., 1:, 0].double().numpy()
    np.testing.assert_allclose(mass, to_first.sum(-1).mean() / 32, rtol=1e-4)

    others = np.abs(hidden_states(teacher, tokens)[:, :, 1:]).max((1, 2, 3))
    limits = np.maximum(others / 2, limit)
    assert (limits > limit).all() == teachers_own_counts
    largest = np.abs(hidden_states(student, tokens)).max((1, 2, 3))
    squares = np.maximum(largest / limits - 1, 0) ** 2
    assert squares[1] > 0.1
    np.testing.assert_allclose(excess, squares.mean(), rtol=1e-4)
    np.testing.assert_allclose(loss, divergence + 2 * mass + 3 * excess, rtol=1e-5)


def test_training_makes_large_hidden_states_smaller(sinks: list[Any]) -> None:
    student = converted(sink_model())
    teacher = ungated(student, share_weights=False)
    trained = student.base_model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    directions = [layer.direction for layer in sinks]
    distillation = SinkDistillation(
        student, teacher, directions, sink_weight=0.0, hidden_weight=1.0, hidden_limit=500.0
    )
    optimizer = torch.optim.Adam([trained], 0.2)
    tokens = windows(2, 32, seed=1)
    before = np.abs(hidden_states(student, tokens)).max()
    for _ in range(40):
        distillation(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 800
    assert np.abs(hidden_states(student, tokens)).max() < 520


@pytest.mark.parametrize("has_sinks", [False, True])
def test_gates_are_trained_where_there_are_sinks(sinks: list[Any], has_sinks: bool, tmp_path: Path) -> None:
    """And all attention blocks are, also in a model that has no sink at all."""
    edited = converted(sink_model(scale=0.9))
    before = {name: parameter.clone() for name, parameter in edited.named_parameters()}
    directions = [None, *(layer.direction for layer in sinks[1:])] if has_sinks else [None] * 4
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    text = Text("bytes", *(windows(1, 400, seed).flatten().tolist() for seed in range(3)))
    settings = AbsorptionSettings(distill_tokens=256, window_tokens=64, long_window_tokens=0, calibration_tokens=64)
    original = ungated(converted(sink_model()), share_weights=False)
    distil(original, edited, directions, [text], byte_tokenizer(), tmp_path, settings)
    changed = {name for name, parameter in edited.named_parameters() if not torch.equal(parameter, before[name])}
    for layer in range(4):
        block = f"model.layers.{layer}.self_attn"
        assert f"{block}.q_proj.weight" in changed
        assert (f"{block}.g_proj.weight" in changed) == (has_sinks and layer > 0)
    assert not any("mlp" in name or "embed" in name for name in changed)
    assert not any(parameter.requires_grad for parameter in edited.parameters())


def test_training_ends_by_text_of_its_own() -> None:
    """Neither what is trained on nor what is measured on."""
    texts = [Text("a", [1] * 900, [9] * 900, [5] * 300), Text("b", [1] * 90, [9] * 90, [6] * 20), Text("c", [1], [9])]
    actual = _validation_windows(texts, 64)
    assert [(tuple(batch.shape), batch.unique().tolist()) for batch in actual] == [
        ((1, 64), [5]),
        ((1, 64), [5]),
        ((1, 20), [6]),
    ]
    with pytest.raises(AbsorptionError, match="at least 2 tokens of validation text, got none"):
        _validation_windows(texts[2:], 64)

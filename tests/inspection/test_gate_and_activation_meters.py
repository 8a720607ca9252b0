"""Meters of gates and activations against NumPy in float64, with padding and packed sequences left out of the wrong."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from modeling_gated.configuration.configuration_gated_llama import GATE_PROJECTIONS
from modeling_gated.inspection import (
    GateDrift,
    GateScores,
    InspectionError,
    MassiveActivations,
    QuantizationError,
    inspecting,
)
from modeling_gated.modeling_gated_llama import GatedLlamaAttention
from modeling_gated.training import gate_peft_config
from tests.helpers.cache_by_version import cache_of, with_cache
from tests.helpers.gated_models import gated_model
from tests.helpers.inspected_models import INPUTS, TOKENS, inputs_of, inspected_model
from tests.helpers.numpy_reference import ACTIVATIONS
from tests.helpers.paper_variants import CONFIGS, random_model


def places(kind: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(row, token) of the first token of each sequence, and of all others."""
    parts = [(row, part) for row, sequences in enumerate(INPUTS[kind]) for part in sequences]
    return [(row, part.start) for row, part in parts], [(row, place) for row, part in parts for place in part[1:]]


def attention_inputs(model: PreTrainedModel, inputs: dict[str, Any]) -> list[np.ndarray]:
    """X of each layer, float64 [batch, tokens, hidden_size]."""
    seen: list[np.ndarray] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, given, named: seen.append(named["hidden_states"].double().numpy()), with_kwargs=True
        )
        for layer in model.base_model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.fast
@pytest.mark.parametrize("kind", list(INPUTS))
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.gate_position])
def test_gate_scores_are_those_of_the_formula(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every variant of the paper: all positions, headwise and elementwise, shared, independent of the input."""
    model, inputs = random_model(name), inputs_of(kind)
    config, gate_logits = model.config, GatedLlamaAttention.gate_logits
    log_sum_exps: dict[int, np.ndarray] = {}

    def spy(attention: Any, projection: Any, gate_input: Any, *log_sum_exp: torch.Tensor) -> torch.Tensor:
        if log_sum_exp:
            log_sum_exps[attention.layer_idx] = log_sum_exp[0].double().numpy()
        return gate_logits(attention, projection, gate_input, *log_sum_exp)

    monkeypatch.setattr(GatedLlamaAttention, "gate_logits", spy)
    meter = GateScores(bins=10)
    with torch.no_grad(), inspecting(model, meter):
        model(**inputs)
    actual = meter.result()
    assert set(actual) == set(config.gate_position)
    first, others = places(kind)
    everywhere = first + others
    for layer, states in enumerate(attention_inputs(model, inputs)):
        for position, statistics in actual.items():
            gate = getattr(model.model.layers[layer].self_attn, GATE_PROJECTIONS[position])
            weights = {name: tensor.double().detach().numpy() for name, tensor in gate.named_parameters()}
            given = np.ones((2, TOKENS, 1)) if config.gate_input_independent else states
            logits = given @ weights["weight"].T + weights.get("bias", 0.0)
            assert (layer in log_sum_exps) == (config.gate_logit_lse_weight > 0)
            scores = ACTIVATIONS[config.gate_activation](logits + log_sum_exps.get(layer, 0.0))
            of_head = {"headwise": 1, "elementwise": 64 if position == "G5" else 16}[config.gate_granularity]
            scores = scores.reshape(2, TOKENS, -1, of_head)

            def mean(numbers: np.ndarray, where: list[tuple[int, int]]) -> np.ndarray:
                return np.stack([numbers[place] for place in where]).mean(axis=(0, 2))

            expected = {
                "mean": mean(scores, everywhere),
                "value": mean(scores, everywhere) * config.gate_scale,
                "below": mean(scores < 0.1, everywhere),
                "above": mean(scores > 0.9, everywhere),
                "first_token": mean(scores, first),
                "other_tokens": mean(scores, others),
            }
            for field, numbers in expected.items():
                np.testing.assert_allclose(getattr(statistics, field)[layer], numbers, rtol=1e-4, atol=1e-5)
            flat = np.clip(np.stack([scores[place] for place in everywhere]).ravel(), 0, 0.9999)
            counts = np.histogram(flat, bins=10, range=(0, 1))[0]
            assert np.abs(statistics.histogram[layer].numpy() - counts).max() <= 1  # where one lies on an edge
            assert statistics.histogram[layer].sum() == len(flat)


def test_scores_are_before_the_scale_and_values_after() -> None:
    model, inputs = gated_model(gate_scale=2.0), inputs_of("plain")
    meter, drift = GateScores(), GateDrift(1.5)
    with torch.no_grad(), inspecting(model, meter, drift):
        model(**inputs)
    actual = meter.result()["G1"]
    torch.testing.assert_close(actual.value, 2 * actual.mean)
    assert actual.mean.max() < 1
    values = []
    for layer, states in zip(model.model.layers, attention_inputs(model, inputs), strict=True):
        gate = layer.self_attn.g_proj
        logits = states @ gate.weight.detach().double().numpy().T + gate.bias.detach().double().numpy()
        values.append(2 / (1 + np.exp(-logits)))
    assert drift.result() == pytest.approx(np.abs(np.stack(values) - 1.5).mean(), rel=1e-5)


def test_gates_inside_peft_are_seen() -> None:
    """In full (`modules_to_save`, which wraps them), and behind LoRA."""
    model, inputs = gated_model(), inputs_of("plain")
    for config in (gate_peft_config(LoraConfig(target_modules=["q_proj"])), LoraConfig(target_modules=["g_proj"])):
        tuned = get_peft_model(gated_model(), config)
        meter, expected = GateScores(), GateScores()
        with torch.no_grad(), inspecting(tuned.get_base_model(), meter):
            tuned(**inputs)
        with torch.no_grad(), inspecting(model, expected):
            model(**inputs)
        torch.testing.assert_close(meter.result()["G1"].mean, expected.result()["G1"].mean)


def test_a_model_without_gates_has_none() -> None:
    model, inputs = inspected_model("llama, grouped queries"), inputs_of("plain")
    meter, drift = GateScores(), GateDrift(1.0)
    with torch.no_grad(), inspecting(model, meter, drift):
        model(**inputs)
    assert meter.result() == {}
    assert np.isnan(drift.result())


def hidden_states(model: PreTrainedModel, inputs: dict[str, Any]) -> list[np.ndarray]:
    """Embeddings, each layer's output and the last norm's, from hooks of the test's own."""
    seen: list[np.ndarray] = []
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm]

    def keep(module: torch.nn.Module, given: object, output: Any) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).double().numpy())

    hooks = [part.register_forward_hook(keep) for part in parts]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", list(INPUTS))
def test_the_largest_activations_are_found_with_channel_and_token(kind: str) -> None:
    model, inputs = gated_model(), inputs_of(kind)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] *= 400  # channel 5 is massive from there on
        model.model.embed_tokens.weight[0] = 1e6  # of padding, which is not to be seen
    if kind.startswith("padded"):
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    meter = MassiveActivations(top=4)
    with torch.no_grad(), inspecting(model, meter):
        model(**inputs)
    actual = meter.result()
    starts = {(row, place): part.start for row, parts in enumerate(INPUTS[kind]) for part in parts for place in part}
    first, others = places(kind)
    expected = hidden_states(model, inputs)
    assert len(expected) == 5
    for layer, states in zip((actual.embeddings, *actual.layers, actual.final), expected, strict=True):
        real = [((row, place), channel) for row, place in first + others for channel in range(48)]
        real.sort(key=lambda where: -abs(states[where[0]][where[1]]))
        assert layer.maximum == pytest.approx(abs(states[real[0][0]][real[0][1]]), rel=1e-6)
        for seen, (place, channel) in zip(layer.top, real, strict=False):
            assert seen.value == pytest.approx(states[place][channel], rel=1e-6)
            if abs(seen.value) < 0.999 * layer.maximum:
                continue  # among equal ones any may come first
            assert (seen.channel, seen.position) == (channel, place[1] - starts[place])
            assert seen.token_id == inputs["input_ids"][place]
        numbers = np.abs(np.stack([states[place] for place in first + others]))
        # Of an even number of numbers, torch's median is the lower one of the middle.
        assert layer.median == pytest.approx(np.sort(numbers.ravel())[(numbers.size - 1) // 2], rel=1e-5)
    assert actual.layers[2].top[0].channel == 5
    assert actual.mean_maximum == pytest.approx(np.mean([layer.maximum for layer in actual.layers]))


def test_several_passes_are_one_measurement() -> None:
    """The largest of all, and positions counted from the start of the sequence, through a cache too."""
    model, inputs = gated_model(), inputs_of("plain")
    whole, parts = MassiveActivations(), MassiveActivations()
    with torch.no_grad():
        with inspecting(model, whole):
            model(**inputs)
        with inspecting(model, parts):
            cache = None
            for chunk in inputs["input_ids"].split(11, dim=1):
                cache = cache_of(model(chunk, use_cache=True, **with_cache(cache)))
    for one, other in zip(whole.result().layers, parts.result().layers, strict=True):
        assert [(activation.channel, activation.position) for activation in one.top] == [
            (activation.channel, activation.position) for activation in other.top
        ]


@pytest.mark.parametrize("kind", list(INPUTS))
def test_int8_errors_are_those_of_rounding(kind: str) -> None:
    model, inputs = gated_model(), inputs_of(kind)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] *= 400
    meter = QuantizationError()
    with torch.no_grad(), inspecting(model, meter):
        model(**inputs)
    actual = meter.result()
    first, others = places(kind)
    for layer, states in enumerate(hidden_states(model, inputs)[1:-1]):
        errors: dict[str, list[float]] = {"per_tensor": [], "per_token": []}
        for row in range(2):
            rows = np.stack([states[place] for place in first + others if place[0] == row])
            for token in rows:
                for name, largest in (("per_tensor", np.abs(rows).max()), ("per_token", np.abs(token).max())):
                    scale = largest / 127
                    errors[name].append(np.linalg.norm(token - np.round(token / scale) * scale) / np.linalg.norm(token))
        for name, numbers in errors.items():
            # In float32 a number just between two steps may go to the other one.
            assert getattr(actual, name)[layer] == pytest.approx(np.mean(numbers), rel=2e-3)
    assert actual.per_tensor[2] > 3 * actual.per_tensor[0]  # which is what massive activations cost


def test_settings_and_shapes_that_make_no_sense_are_refused() -> None:
    model = gated_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(InspectionError, match="no list of num_hidden_layers=7 layers"), inspecting(model):
        pass

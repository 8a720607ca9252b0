"""What an edit does to a layer, and to a whole model that has a sink built into it."""

from typing import Any

import numpy as np
import pytest
import torch

from modeling_gated.absorption import AbsorptionSettings, absorb_sinks, find_writers, remove_writers
from modeling_gated.absorption.edit.closed_form import absorb_layer, output_error
from modeling_gated.absorption.edit.gate_fit import fit_gates
from modeling_gated.absorption.edit.layer_states import LayerStates
from modeling_gated.absorption.edit.refinement import Refinement
from modeling_gated.absorption.edit.sinks import layer_sinks
from modeling_gated.inspection import FirstTokenAttention, MassiveActivations, inspecting, open_gates
from modeling_gated.training import ungated
from tests.helpers.sink_model import HEIGHT, WRITERS, converted, sink_model, windows


SETTINGS = AbsorptionSettings(window_tokens=64, calibration_tokens=64, refinement_epochs=0)
TOKENS = windows(16, 48)


def edited_and_original():
    model = converted(sink_model())
    return model, ungated(model, share_weights=False)


class Constant(torch.nn.Module):
    """A norm of keys that gives the same whatever it is given."""

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(keys)


@torch.no_grad()
def loss_of_predictions(original, edited) -> float:
    """KL(original || edited) in nats per token, on windows that nothing was fitted on."""
    tokens = windows(8, 48, seed=7)
    expected, actual = (model(tokens, use_cache=False).logits.log_softmax(-1) for model in (original, edited))
    return torch.nn.functional.kl_div(actual, expected, log_target=True, reduction="none").sum(-1)[:, 1:].mean().item()


@pytest.mark.fast
@pytest.mark.parametrize("scale", [1.0, 1 / 0.85])
def test_gates_that_are_logistic_are_found(scale: float) -> None:
    """Those of known weights come back, on tokens that the fit has not seen."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 12, generator=generator) * 3 + 1
    weight, bias = torch.randn(5, 12, generator=generator) * 0.1, torch.randn(5, generator=generator)
    targets = scale * torch.sigmoid(inputs @ weight.T + bias)
    fit = fit_gates(inputs, targets, scale=scale, ridge=1e-7)
    torch.testing.assert_close(fit.weight, weight, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(fit.bias, bias, rtol=2e-2, atol=2e-2)
    assert (fit.score > 0.999).all()
    noise = torch.rand(4000, 2, generator=generator)
    assert (fit_gates(inputs, noise, scale=1.0).score.abs() < 0.05).all()


@pytest.mark.fast
def test_writers_are_the_neurons_that_were_built_in() -> None:
    model = converted(sink_model())
    writers = find_writers(model, TOKENS.split(4))
    assert {writer.layer: writer.neuron for writer in writers} == WRITERS
    assert [writer.channel for writer in writers] == [2, 2]
    assert abs(writers[0].value) >= abs(writers[1].value) > 0.9 * HEIGHT
    before = [layer.mlp.down_proj.weight.clone() for layer in model.base_model.layers]
    remove_writers(model, writers)
    for number, layer in enumerate(model.base_model.layers):
        changed = (layer.mlp.down_proj.weight != before[number]).any(0).nonzero().flatten().tolist()
        assert changed == ([WRITERS[number]] if number in WRITERS else [])
    assert find_writers(model, TOKENS.split(4)) == []
    meter = MassiveActivations(top=1)
    with torch.no_grad(), inspecting(model, meter):
        model(TOKENS, use_cache=False)
    assert max(layer.maximum for layer in meter.result().layers) < 20


def test_a_gate_stands_between_attention_and_the_sinks_value() -> None:
    """The block gives W_o (g (o - v) + v), with o its attention to all tokens as keys are now: NumPy, in float64."""
    model, original = edited_and_original()
    before, after = LayerStates(original, [TOKENS]), LayerStates(model, [TOKENS])
    before.advance(), after.advance()
    sinks = layer_sinks(before)
    absorb_layer(after, sinks)
    attention = after.layer.self_attn
    hidden = after.input(0)
    with torch.no_grad():
        actual, inputs = after.attend(hidden)
        gates = attention.gate_values(attention.g_proj(hidden)).double().numpy()  # [batch, tokens, heads]
        probabilities = inputs.probabilities(torch.arange(48)).double().numpy()
    source = original.base_model.layers[1].self_attn
    values = (hidden @ source.v_proj.weight.T).view(16, 48, 2, 8).double().numpy().repeat(2, 2)
    output = np.einsum("bhqk,bkhd->bqhd", probabilities, values)
    kept = np.stack([sinks.value[0], sinks.value[0], np.zeros(8), np.zeros(8)])
    expected = gates[..., None] * (output - kept) + kept
    expected = expected.reshape(16, 48, 32) @ source.o_proj.weight.double().numpy().T
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    assert (gates[..., 2:] == 1).all()  # no sink: their gates, keys and values stay what they are
    assert gates[:, 1:, :2].mean() < 0.4
    assert torch.equal(attention.k_proj.weight[8:], source.k_proj.weight[8:])
    assert not attention.v_proj.bias[8:].any()


def test_first_tokens_get_what_comes_nearer() -> None:
    """
    They see themselves alone. Before the spike, their value is the original's, and gates stay open; once its writers
    are gone it is another one, and the mean of sinks' values is nearer.
    """
    model, original = edited_and_original()
    remove_writers(model, find_writers(model, TOKENS.split(4)))
    before, after = LayerStates(original, [TOKENS]), LayerStates(model, [TOKENS])
    gates, errors = {}, {}
    for layer in range(4):
        sinks = layer_sinks(before)
        absorb_layer(after, sinks)
        hidden, attention = after.input(0), after.layer.self_attn
        with torch.no_grad():
            gates[layer] = attention.gate_values(attention.g_proj(hidden))[:, 0, :2].mean().item()
            actual = after.attend(hidden)[0][:, 0]
        errors[layer] = ((actual - sinks.outputs[0][:, 0]).norm() / sinks.outputs[0][:, 0].norm()).item()
        before.advance(), after.advance()
    assert gates[1] > 0.8
    assert max(gates[2], gates[3]) < 0.2
    assert max(errors.values()) < 0.5  # of the whole block, also the heads that have no sink


def test_a_layer_without_sinks_stays_as_it_is() -> None:
    model, original = edited_and_original()
    before = {name: tensor.clone() for name, tensor in model.base_model.layers[0].named_parameters()}
    layer = absorb_layer(LayerStates(model, [TOKENS]), layer_sinks(LayerStates(original, [TOKENS])))
    assert layer.gated == [False, False]
    assert layer.keys_edited == [False, False]
    assert layer.gate_score == [None] * 4
    assert layer.error == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.layers[0].named_parameters())


@pytest.mark.fast
def test_what_an_edit_takes_away_and_what_it_leaves() -> None:
    """The sink and the spike go, predictions stay near; with the same keys and no gates they do not."""
    model, original = edited_and_original()
    edit = absorb_sinks(original, model, TOKENS.split(4), SETTINGS)
    assert {writer.layer for writer in edit.writers} == set(WRITERS)
    assert [layer.gated for layer in edit.layers] == [[False, False], *[[True, False]] * 3]
    assert [direction is None for direction in edit.directions] == [True, False, False, False]
    sink, spike = FirstTokenAttention(), MassiveActivations(top=1)
    with torch.no_grad(), inspecting(model, sink, spike):
        model(windows(8, 48, seed=7), use_cache=False)
    assert sink.result()[1:, :2].max() < 0.1  # as much as any other token of 48 gets
    assert max(layer.maximum for layer in spike.result().layers) < 20
    assert min(score for layer in edit.layers[1:] for score in layer.gate_score[:2]) > 0.4
    lost = loss_of_predictions(original, model)
    without, original = edited_and_original()
    absorb_sinks(original, without, TOKENS.split(4), AbsorptionSettings(**vars(SETTINGS) | {"edits_gates": False}))
    assert lost < 0.25 * loss_of_predictions(original, without)


def test_keys_keep_the_direction_where_taking_it_away_does_not_help() -> None:
    """With QK-norm a key without it is scaled up again: then keys stay, bit for bit, and only gates are set."""
    model, original = edited_and_original()
    before, after = LayerStates(original, [TOKENS]), LayerStates(model, [TOKENS])
    before.advance(), after.advance()
    sinks = layer_sinks(before)
    attention = after.layer.self_attn
    attention.k_norm = Constant()
    kept = attention.k_proj.weight.clone()
    layer = absorb_layer(after, sinks)
    assert layer.keys_edited == [False, False]
    assert torch.equal(attention.k_proj.weight, kept)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate_granularity": "elementwise"},
        {"use_qk_norm": True},
        {"sliding_window": 40},
        {"tie_word_embeddings": True},
    ],
    ids=lambda fields: next(iter(fields), "float32"),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_go_whatever_the_layers_have(fields: dict[str, Any], dtype: torch.dtype) -> None:
    """And gates are what keeps predictions: with open ones they are lost."""
    model = converted(sink_model(), **fields)
    for layer in model.base_model.layers:  # as those of Qwen2 have
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias.normal_(std=0.05)
    model = model.to(dtype)
    original = ungated(model, share_weights=False)
    settings = AbsorptionSettings(**vars(SETTINGS) | {"refinement_epochs": 10})
    absorb_sinks(original, model, TOKENS.split(2), settings)
    meters = FirstTokenAttention(), FirstTokenAttention()
    for inspected, meter in zip((original, model), meters, strict=True):
        with torch.no_grad(), inspecting(inspected, meter):
            inspected(windows(8, 48, seed=7), use_cache=False)
    before, after = (meter.result()[1:, :2].mean() for meter in meters)
    assert before > 0.2
    assert after < 0.3 * before
    lost = loss_of_predictions(original, model)
    with open_gates(model):
        assert lost < 0.5 * loss_of_predictions(original, model)


def test_refinement_comes_nearer_to_the_original() -> None:
    model, original = edited_and_original()
    before, after = LayerStates(original, TOKENS.split(4)), LayerStates(model, TOKENS.split(4))
    before.advance(), after.advance()
    sinks = layer_sinks(before)
    closed = absorb_layer(after, sinks)
    refined = absorb_layer(after, sinks, edits_keys=False, edits_gates=False, refine=Refinement(epochs=20))
    assert refined.error < 0.9 * closed.error
    assert max(refined.mass_left) <= max(closed.mass_left)
    assert refined.error == pytest.approx(output_error(after, sinks))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_left_out_for_comparison_is_left_out() -> None:
    for name, changed in {
        "removes_writers": lambda edit: not edit.writers,
        "edits_keys": lambda edit: not any(any(layer.keys_edited) for layer in edit.layers),
        "edits_gates": lambda edit: not any(any(layer.gated) for layer in edit.layers),
    }.items():
        model, original = edited_and_original()
        edit = absorb_sinks(original, model, TOKENS.split(4), AbsorptionSettings(**vars(SETTINGS) | {name: False}))
        assert changed(edit), name

"""Interventions change what they say and nothing else, and go away again."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from transformers import PreTrainedModel

from modeling_gated.inspection import (
    FirstTokenAttention,
    GateScores,
    InspectionError,
    closed_gates,
    forced_gates,
    inspecting,
    int8_activations,
    int8_weights,
    masked_first_token,
    open_gates,
    shuffled_gates,
    windowed_attention,
)
from modeling_gated.inspection.interventions.named import Intervention
from modeling_gated.training.distillation import ungated
from tests.helpers.gated_models import VARIANTS, close_gates, gated_model
from tests.helpers.inspected_models import INPUTS, TOKENS, inputs_of, inspected_model
from tests.helpers.paper_variants import random_model


@torch.no_grad()
def logits(model: PreTrainedModel, kind: str = "plain") -> torch.Tensor:
    return model(**inputs_of(kind)).logits


@pytest.mark.fast
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_closed_and_open_gates(variant: str) -> None:
    """Closed: as with a bias of minus infinity. Open: as the same model without gates."""
    model = gated_model(variant)
    before = logits(model)
    with closed_gates(model):
        closed = logits(model)
    with open_gates(model):
        opened = logits(model)
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(opened, logits(ungated(model)), rtol=1e-4, atol=1e-4)
    close_gates(model)
    assert torch.equal(closed, logits(model))


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_one_layer_and_one_head(granularity: str) -> None:
    """Others keep theirs, as the meter of gates, which sees what was forced, says."""
    model = gated_model(gate_granularity=granularity, gate_scale=0.5)
    plain, forced = GateScores(), GateScores()
    with torch.no_grad():
        with inspecting(model, plain):
            model(**inputs_of("plain"))
        with forced_gates(model, 0.25, layer=1, head=2), inspecting(model, forced):
            model(**inputs_of("plain"))
    actual, before = forced.result()["G1"].value, plain.result()["G1"].value
    assert actual[1, 2] == 0.25
    others = [head for head in range(6) if head != 2]
    torch.testing.assert_close(actual[1, others], before[1, others])
    torch.testing.assert_close(actual[0], before[0])
    assert not torch.allclose(actual[2], before[2])  # behind it, where hidden states are others
    again = GateScores()
    with torch.no_grad(), inspecting(model, again), forced_gates(model, 0.25, layer=1, head=2):
        model(**inputs_of("plain"))  # the other way round
    assert torch.equal(again.result()["G1"].value, actual)
    assert "gated" not in vars(model.model.layers[1].self_attn)


def test_one_position() -> None:
    model = random_model("G1 to G5")
    meter = GateScores()
    with torch.no_grad(), forced_gates(model, 0.125, position="G3"), inspecting(model, meter):
        model(**inputs_of("plain"))
    values = {position: actual.value for position, actual in meter.result().items()}
    assert (values["G3"] == 0.125).all()
    assert all((values[position] != 0.125).all() for position in ("G1", "G2", "G4", "G5"))


@pytest.mark.parametrize("kind", list(INPUTS))
def test_shuffled_gates_are_the_same_ones_on_other_tokens(kind: str) -> None:
    """In the first layer, whose gates nothing else has changed; padding keeps to itself."""
    model = gated_model(num_hidden_layers=1)
    plain, shuffled = GateScores(bins=1000), GateScores(bins=1000)
    with torch.no_grad():
        with inspecting(model, plain):
            before = model(**inputs_of(kind)).logits
        with shuffled_gates(model, seed=1), inspecting(model, shuffled):
            after = model(**inputs_of(kind)).logits
        with shuffled_gates(model, seed=1):
            assert torch.equal(model(**inputs_of(kind)).logits, after)
        with shuffled_gates(model, seed=2):
            assert not torch.equal(model(**inputs_of(kind)).logits, after)
    one, other = plain.result()["G1"], shuffled.result()["G1"]
    assert torch.equal(one.histogram, other.histogram)
    torch.testing.assert_close(one.mean, other.mean)
    assert not torch.allclose(one.first_token, other.first_token)
    assert not torch.allclose(before, after, atol=1e-3)


def test_shuffling_gates_that_do_not_depend_on_the_token_changes_nothing() -> None:
    model = random_model("G1 input-independent")
    before = logits(model)
    with shuffled_gates(model):
        assert torch.equal(logits(model), before)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "implementation", "after"), [*product(INPUTS, ["eager", "sdpa"], [0, 6]), ("plain", "flex_attention", 6)]
)
def test_a_masked_first_token_is_as_with_the_mask_written_out(kind: str, implementation: str, after: int) -> None:
    def sees(query: int, key: int) -> bool:
        return key > 0 or query <= after

    check_mask(kind, implementation, sees, lambda model: masked_first_token(model, after))


@pytest.mark.parametrize(
    ("kind", "implementation", "first"), [*product(INPUTS, ["eager", "sdpa"], [0, 2]), ("plain", "flex_attention", 2)]
)
def test_a_window_is_as_with_the_mask_written_out(kind: str, implementation: str, first: int) -> None:
    """The last five tokens, itself the last of them, and the first ones of the sequence."""

    def sees(query: int, key: int) -> bool:
        return query - key < 5 or key < first

    check_mask(kind, implementation, sees, lambda model: windowed_attention(model, 5, first))


def check_mask(kind: str, implementation: str, sees: Callable[[int, int], bool], apply: Callable) -> None:
    """That an intervention is a mask by which a query sees the keys of its sequence that `sees` says."""
    model = gated_model()
    inputs = inputs_of(kind)
    mask = torch.zeros(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    real = torch.zeros(2, TOKENS, dtype=torch.bool)
    for row, parts in enumerate(INPUTS[kind]):
        for part in parts:
            for query in part:
                for key in range(part.start, query + 1):
                    mask[row, 0, query, key] = sees(query - part.start, key - part.start)
                real[row, query] = True
    positions = inputs.get("position_ids")
    with torch.no_grad():
        expected = model(inputs["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation(implementation)
        # Uncompiled: on a processor with AVX2 alone, torch 2.13's compiled kernel was wrong for heads this small.
        with torch.compiler.set_stance("force_eager"):
            plain = model(**inputs).logits
            with apply(model):
                actual = model(**inputs).logits
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actual[real], plain[real], atol=1e-2)
    assert model.config._attn_implementation == implementation


def test_int8_weights_are_those_rounded_by_hand() -> None:
    """One scale for each projection of the layers, and no other parameter; afterwards all are what they were."""
    model, by_hand = gated_model(), gated_model()
    with torch.no_grad():
        for module in by_hand.base_model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().max() / 127
                module.weight.copy_((module.weight / scale).round() * scale)
    before = logits(model)
    with int8_weights(model):
        actual = logits(model)
    torch.testing.assert_close(actual, logits(by_hand), rtol=1e-4, atol=1e-5)
    assert not torch.equal(actual, before)
    assert torch.equal(logits(model), before)


def test_int8_activations_are_those_rounded_by_hand() -> None:
    """What projections are given and layers give, each with one scale: at most half a step from what it was."""
    model = gated_model()
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda module, arguments, *output: seen.__setitem__(name, output[0] if output else arguments[0])

    layer = model.base_model.layers[0]
    layer.mlp.down_proj.register_forward_pre_hook(keep("before"))
    layer.register_forward_hook(keep("layer before"))
    before = logits(model)
    with int8_activations(model):
        layer.mlp.down_proj.register_forward_pre_hook(keep("after"))
        layer.register_forward_hook(keep("layer after"))
        actual = logits(model)
    for name in ("", "layer "):
        given, rounded = seen[f"{name}before"], seen[f"{name}after"]
        scale = given.abs().max() / 127
        torch.testing.assert_close(rounded, (given / scale).round() * scale, rtol=1e-4, atol=1e-6)
        assert len(rounded.unique()) <= 255
    assert not torch.equal(actual, before)
    assert torch.equal(logits(model), before)


def test_meters_see_through_a_masked_first_token() -> None:
    """Its attention is then 0, but for queries that still see it; windows and any other model too."""
    for name in ("llama, grouped queries", "mistral, sliding window", "gemma2, softcap"):
        model, meter = inspected_model(name), FirstTokenAttention()
        with torch.no_grad(), masked_first_token(model), inspecting(model, meter):
            model(**inputs_of("plain"))
        assert (meter.result() == 0).all()
        with torch.no_grad(), inspecting(model, meter), masked_first_token(model):  # the other way round
            model(**inputs_of("plain"))
        assert (meter.result() == 0).all()
        with torch.no_grad(), masked_first_token(model, after=3), inspecting(model, meter):
            model(**inputs_of("plain"))
        assert (meter.result() > 0).all()


def test_what_cannot_be_done_is_refused() -> None:
    model, plain = gated_model(), inspected_model("llama, grouped queries")
    refusals = [
        (lambda: closed_gates(plain), "LlamaForCausalLM: has no gates"),
        (lambda: forced_gates(model, 0.0, layer=3), "layer must be from 0 to 2, got 3"),
        (lambda: forced_gates(model, 0.0, position="G2"), "has no gates at G2"),
        (lambda: forced_gates(model, 0.0, position="G9"), "positions must be among G1, G2, G3, G4, G5, got 'G9'"),
    ]
    for refused, message in refusals:
        with pytest.raises(InspectionError, match=message), refused():
            pass
    with pytest.raises(InspectionError, match="head 6: there is no gate"), forced_gates(model, 0.0, head=6):
        pass
    shared = random_model("G1 one gate per layer")
    with pytest.raises(InspectionError, match="head 0: there is no gate"), forced_gates(shared, 0.0, head=0):
        pass
    with pytest.raises(InspectionError, match="is not changed"), masked_first_token(model), torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InspectionError, match="takes no mask"), masked_first_token(model):
        pass


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("masked_first_token", masked_first_token),
        ("masked_first_token@5", lambda model: masked_first_token(model, 5)),
        ("window=5", lambda model: windowed_attention(model, 5)),
        ("window=5+2", lambda model: windowed_attention(model, 5, 2)),
        ("int8_weights", int8_weights),
        ("int8_activations", int8_activations),
        ("closed_gates", closed_gates),
        ("open_gates", lambda model: forced_gates(model, 1.0)),
        ("shuffled_gates", shuffled_gates),
        ("gates=0.5", lambda model: forced_gates(model, 0.5)),
        ("gates=-1@2", lambda model: forced_gates(model, -1.0, layer=2)),
        ("gates=.25@0.3", lambda model: forced_gates(model, 0.25, layer=0, head=3)),
    ],
)
def test_names_of_interventions(name: str, same) -> None:
    model = gated_model()
    with Intervention.parse(name).apply(model):
        actual = logits(model)
    with same(model):
        assert torch.equal(logits(model), actual)
    assert not torch.equal(logits(model), actual)


@pytest.mark.parametrize(
    "name",
    ["", "gates", "gates=", "gates=1.2.3", "gates=1@a", "gates=1@2.", "masked_first_token@", "window=", "window=4+"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InspectionError, match="interventions must be among masked_first_token, int8_weights"):
        Intervention.parse(name)

"""Where sinks are and what they get, against eager attention and float64 NumPy."""

import numpy as np
import pytest
import torch

from modeling_gated.absorption.edit.attention import captured_attention
from modeling_gated.absorption.edit.layer_states import LayerStates
from modeling_gated.absorption.edit.sinks import layer_sinks, mass_on, sink_direction
from tests.helpers.gated_models import VARIANTS, gated_model
from tests.helpers.sink_model import BOS, FIRST, converted, sink_model, windows


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_probabilities_are_eager_attentions(variant: str) -> None:
    """Grouped queries, QK-norm and sliding windows; any rows of them."""
    model = gated_model(variant)
    model.set_attn_implementation("eager")
    tokens = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([0, 3, 11, 19])
    with torch.no_grad(), captured_attention(model.base_model) as captured:
        expected = model(tokens, output_attentions=True, use_cache=False).attentions
    assert list(captured) == [0, 1, 2]
    for layer, inputs in captured.items():
        torch.testing.assert_close(inputs.probabilities(rows), expected[layer][:, :, rows], rtol=1e-5, atol=1e-6)
        sinks = torch.zeros(2, 20, dtype=torch.bool)
        sinks[:, [0, 11]] = True
        actual = inputs.to_sinks(sinks, rows).sum(-1)
        both = expected[layer][:, :, rows][..., [0, 11]]
        both[:, :, 0, 0] = 0  # token 0's attention to itself
        both[:, :, 2, 1] = 0  # and token 11's
        torch.testing.assert_close(actual, both.sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["headwise", "sliding upper layers", "QK-norm, tied"])
def test_layer_by_layer_is_the_whole_model(variant: str) -> None:
    model = gated_model(variant)
    tokens = torch.randint(1, 96, (4, 20), generator=torch.Generator().manual_seed(1))
    states = LayerStates(model, tokens.split(2))
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        for layer in range(3):
            torch.testing.assert_close(torch.cat(states.states), expected[layer], rtol=1e-4, atol=1e-5)
            states.advance()
        last = model.base_model.norm(torch.cat(states.states))
    torch.testing.assert_close(last, expected[3], rtol=1e-4, atol=1e-5)


def test_the_direction_of_a_sink() -> None:
    """w = C⁻¹u / uᵀC⁻¹u with C's ridge; read from other tokens' inputs there is less of it than of any other w."""
    inputs = torch.randn(6, 12, 8, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] += 5
    direction = sink_direction(inputs.split(2), ridge=1e-2)
    values = inputs.double().numpy()
    u, later = values[:, 0].mean(0), values[:, 4:].reshape(-1, 8)
    moment = later.T @ later / len(later)
    moment += 1e-2 * np.diag(moment).mean() * np.eye(8)
    solved = np.linalg.solve(moment, u)
    np.testing.assert_allclose(direction.direction, u, rtol=1e-5)
    np.testing.assert_allclose(direction.projector, solved / (solved @ u), rtol=1e-4, atol=1e-6)
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    removed = direction.removed_from(weight)
    torch.testing.assert_close(removed @ direction.direction, torch.zeros(5), atol=1e-5, rtol=0)
    kept = removed @ torch.from_numpy(later).float().T - weight @ torch.from_numpy(later).float().T
    orthogonal = (weight @ direction.direction)[:, None] * (direction.direction @ torch.from_numpy(later).float().T)
    assert kept.square().mean() < (orthogonal / direction.direction.square().sum()).square().mean()


def test_what_sinks_of_a_layer_get_and_give() -> None:
    model = converted(sink_model())
    batches = windows(4, 40).split(2)
    states = LayerStates(model, batches)
    for layer in range(4):
        sinks = layer_sinks(states)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs = model(torch.cat(batches), output_attentions=True, output_hidden_states=True, use_cache=False)
        model.set_attn_implementation("sdpa")
        expected = outputs.attentions[layer][..., 0]
        expected[:, :, 0] = 0
        assert all((tokens[:, 0] & ~tokens[:, 1:].any(1)).all() for tokens in sinks.tokens)
        torch.testing.assert_close(torch.cat(sinks.mass), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mass_on(states, sinks.tokens), sinks.mean_mass, rtol=1e-5, atol=1e-6)
        assert sinks.groups.tolist() == [layer > 0, False]
        attention = model.base_model.layers[layer].self_attn
        with torch.no_grad():
            first = states.input(0)[:1, 0]
            value = attention.v_proj(first).view(2, 8)  # the same token with the same input in every window
        torch.testing.assert_close(sinks.value, value, rtol=1e-3, atol=1e-4)
        states.advance()


def test_other_tokens_with_the_direction_are_sinks_too() -> None:
    """A second BOS in the middle of the text, which later tokens attend to as they do to the first."""
    batch = windows(4, 40)
    batch[:, 20] = BOS
    states = LayerStates(converted(sink_model()), [batch])
    states.advance()
    sinks = layer_sinks(states)
    assert sinks.tokens[0].nonzero()[:, 1].unique().tolist() == [0, 20]
    assert sinks.mass[0][:, 0, 21:].mean() > 0.7
    assert sinks.direction.direction.argmax() == FIRST

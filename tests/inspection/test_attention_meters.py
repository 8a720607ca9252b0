"""Meters of attention give what eager attention's whole matrices give, and leave the model's output as it is."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)

from modeling_gated.inspection import (
    AttentionEntropy,
    AttentionRows,
    EffectiveRank,
    FirstTokenAttention,
    GateScores,
    InspectionError,
    KeyValueNorms,
    MassiveActivations,
    Meter,
    SinkRate,
    inspecting,
)
from tests.helpers.gated_models import gated_model
from tests.helpers.inspected_models import (
    INPUTS,
    MODELS,
    TOKENS,
    eager_attention,
    inputs_of,
    inspected_model,
    mean_over_queries,
    sequences,
)
from tests.helpers.largest_tensor import Largest


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """[heads, queries], in nats; what a learned sink takes counts as one more key."""
    rest = np.clip(1 - probabilities.sum(-1, keepdims=True), 0, None)
    rest[rest < 1e-6] = 0
    everything = np.concatenate([probabilities, rest], axis=-1)
    return -(everything * np.log(np.where(everything > 0, everything, 1))).sum(-1)


# gpt_oss takes packed sequences for one.
@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "kind"), [pair for pair in product(MODELS, INPUTS) if pair != ("gpt_oss, learned sinks", "packed")]
)
def test_they_are_those_of_eager_attention(name: str, kind: str) -> None:
    """To 1e-5, with the output bit for bit the same."""
    model, inputs = inspected_model(name), inputs_of(kind)
    expected = eager_attention(model, inputs)
    first_token, entropies, ranks = FirstTokenAttention(), AttentionEntropy(), EffectiveRank()
    with torch.no_grad():
        plain = model(**inputs).logits
        with inspecting(model, first_token, entropies, ranks):
            metered = model(**inputs).logits
    assert torch.equal(plain, metered)
    for layer, attention in enumerate(expected):
        sink = mean_over_queries(attention, kind, lambda probabilities: probabilities[:, :, 0])
        np.testing.assert_allclose(first_token.result()[layer], sink, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            entropies.result()[layer], mean_over_queries(attention, kind, entropy), rtol=0, atol=1e-5
        )
    assert first_token.result().mean() > 0.01  # or nothing would have been compared


@pytest.mark.fast
@pytest.mark.parametrize("tokens", [None, 16])
@pytest.mark.parametrize("kind", list(INPUTS))
@pytest.mark.parametrize("name", ["llama, grouped queries", "mistral, sliding window"])
def test_sink_rates_follow_their_definition(name: str, kind: str, tokens: int | None) -> None:
    """Of every head by loops over eager attention's matrices."""
    model, inputs = inspected_model(name), inputs_of(kind)
    first, other = [], []  # importance, [layers * heads][sequences]
    for attention in eager_attention(model, inputs):
        for head in range(attention.shape[1]):
            importances = []
            for row, places in sequences(kind):
                end = min(len(places), tokens or len(places))
                probabilities = attention[
                    row, head, places.start : places.start + end, places.start : places.start + end
                ]
                importances.append([probabilities[token:, token].sum() / (end - token) for token in range(end)])
            first.append([importance[0] for importance in importances])
            candidates = [importance[1 : len(importance) - 6 + 1] for importance in importances]
            other.append([max(importance) for importance in candidates if importance])
    for expected, of in ((first, "first"), (other, "other")):
        epsilon = np.median(expected) + 1e-4
        meter = SinkRate(epsilon=epsilon, tokens=tokens, min_queries=6)
        with torch.no_grad(), inspecting(model, meter):
            model(**inputs)
        assert meter.result().sequences == len(list(sequences(kind)))
        actual = getattr(meter.result(), of).flatten()
        np.testing.assert_array_equal(actual, (np.array(expected) > epsilon).mean(1))
        assert 0 < actual.mean() < 1


def test_a_short_window_has_no_other_sinks() -> None:
    """Gu et al.'s: 64 tokens, and tokens that fewer queries than that see are no candidates."""
    model = inspected_model("llama, grouped queries")
    meter = SinkRate(tokens=64)
    with torch.no_grad(), inspecting(model, meter):
        model(torch.arange(1, 91)[None])
    assert meter.result().other.isnan().all()
    assert not meter.result().first.isnan().any()


def test_what_is_registered_goes_away_again() -> None:
    model = inspected_model("llama, grouped queries")
    names = dict(AttentionInterface._global_mapping)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ZeroDivisionError), inspecting(model, FirstTokenAttention(), MassiveActivations()):
        raise ZeroDivisionError
    assert AttentionInterface._global_mapping == names
    assert model.config._attn_implementation == "sdpa"
    after = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert after == hooks


def test_inspections_stand_inside_one_another() -> None:
    model, inputs = inspected_model("llama, grouped queries"), inputs_of("plain")
    outer, inner = FirstTokenAttention(), FirstTokenAttention()
    with torch.no_grad(), inspecting(model, outer):
        model(**inputs)
        with inspecting(model, inner):
            model(**inputs)
    assert torch.equal(inner.result(), outer.result())


def test_probabilities_are_there_for_meters_of_ones_own() -> None:
    class Whole(Meter):
        def start(self, layers: int) -> None:
            self.found = torch.zeros(layers, 2, 9, TOKENS, TOKENS)
            self.logs = torch.zeros(layers, 2, 9, TOKENS)

        def attention(self, rows: AttentionRows) -> None:
            keys = slice(rows.first_key, rows.first_key + rows.shifted.shape[-1])
            self.found[rows.layer, rows.sequence, :, rows.queries, keys] = rows.probabilities
            self.logs[rows.layer, rows.sequence, :, rows.queries] = rows.log_normalizers

    model, inputs = inspected_model("mistral, sliding window"), inputs_of("plain")
    meter = Whole()
    seen: list[torch.Tensor] = []

    def first_scores(attention: torch.nn.Module, arguments: dict, output: object) -> None:
        states = arguments["hidden_states"][:, 0]  # at position 0, where RoPE turns nothing
        query, key = attention.q_proj(states).view(2, 9, 16), attention.k_proj(states).view(2, 3, 16)
        seen.append((query * key.repeat_interleave(3, dim=1)).sum(-1) / 4)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, _, given, output: first_scores(module, given, output), with_kwargs=True
        )
    with torch.no_grad(), inspecting(model, meter):
        model(**inputs)
    expected = torch.tensor(np.stack(eager_attention(model, inputs)))
    torch.testing.assert_close(meter.found.double(), expected, rtol=0, atol=1e-5)
    # log of the sum of exp(scores) = a score less the log of its probability
    keys = torch.stack(seen[:3])  # of the first query, which has one score
    torch.testing.assert_close(meter.logs[..., 0], keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(INPUTS))
def test_norms_and_ranks_leave_padding_out(kind: str) -> None:
    """Keys and values from the projections by hand; singular values by NumPy."""
    model, inputs = gated_model(num_key_value_heads=2), inputs_of(kind)
    norms, ranks = KeyValueNorms(), EffectiveRank()
    seen: dict[str, list[torch.Tensor]] = {"v_proj": [], "k_proj": [], "o_proj": []}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda module, given, output, name=name: seen[name].append(given[0] if name == "o_proj" else output)
        )
        for layer in model.model.layers
        for name in seen
    ]
    with torch.no_grad(), inspecting(model, norms, ranks):
        model(**inputs)
    for hook in hooks:
        hook.remove()
    actual = norms.result()
    starts = [(row, part.start) for row, parts in enumerate(INPUTS[kind]) for part in parts]
    others = [(row, place) for row, parts in enumerate(INPUTS[kind]) for part in parts for place in part[1:]]
    for layer in range(3):
        for name, first, rest in (
            ("k_proj", actual.first_key, actual.other_keys),
            ("v_proj", actual.first_value, actual.other_values),
        ):
            lengths = np.linalg.norm(seen[name][layer].view(2, TOKENS, 2, 8).double().numpy(), axis=-1)
            expected = [np.mean([lengths[place] for place in places], axis=0) for places in (starts, others)]
            np.testing.assert_allclose(first[layer], expected[0], rtol=1e-5)
            np.testing.assert_allclose(rest[layer], expected[1], rtol=1e-5)
        outputs = seen["o_proj"][layer].view(2, TOKENS, 6, 8).double().numpy()
        for head in range(6):
            rows = np.stack([outputs[row, place, head] for row, place in starts + others])
            values = np.linalg.svd(rows, compute_uv=False)
            shares = values / values.sum()
            np.testing.assert_allclose(ranks.result()[layer, head], np.exp(-(shares * np.log(shares)).sum()), rtol=1e-6)


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, max_position_embeddings=8192, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    largest = {}
    for length in (2048, 8192):
        meters = (FirstTokenAttention(), AttentionEntropy(), SinkRate(), KeyValueNorms(), EffectiveRank())
        with torch.no_grad(), Largest() as largest[length], inspecting(model, *meters):
            model(torch.arange(length)[None] % 32, logits_to_keep=1)
    assert largest[8192].elements <= 4.2 * largest[2048].elements
    assert largest[8192].elements < 8192 * 8192 / 30


def infinite_key(model: PreTrainedModel) -> None:
    model.base_model.layers[1].self_attn.k_proj.weight[0, 0] = torch.inf


def nan_output(model: PreTrainedModel) -> None:
    model.base_model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan


def nan_value(model: PreTrainedModel) -> None:
    model.base_model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan


def nan_gate(model: PreTrainedModel) -> None:
    model.base_model.layers[1].self_attn.g_proj.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "meter", "message"),
    [
        (infinite_key, FirstTokenAttention(), "layer 1: attention scores are not finite"),
        (nan_output, MassiveActivations(), "layer 1's output: must be finite"),
        (nan_output, FirstTokenAttention(), "layer 2: attention scores are not finite"),
        (nan_value, KeyValueNorms(), "layer 1's values: must be finite"),
        (nan_value, EffectiveRank(), "layer 1's attention output: must be finite"),
        (nan_gate, GateScores(), "layer 1's gates: must be finite"),
    ],
)
def test_numbers_that_are_not_finite_are_an_error(
    spoil: Callable[[PreTrainedModel], None], meter: Meter, message: str
) -> None:
    model = gated_model()
    with torch.no_grad():
        spoil(model)
        with pytest.raises(InspectionError, match=message), inspecting(model, meter):
            model(**inputs_of("plain"))
    assert model.config._attn_implementation == "sdpa"

"""What a comparison of two models says, against numbers computed plainly."""

import math

import pytest
import torch
from torch.nn import functional

from modeling_gated.absorption import AbsorptionSettings, Windows, absorb_sinks, compare, prove
from modeling_gated.absorption.card import markdown_table, quality_rows, sink_rows
from modeling_gated.absorption.comparison import GATE_INTERVENTIONS, INTERVENTIONS
from modeling_gated.absorption.texts import Text
from modeling_gated.inspection import FirstTokenAttention, inspecting, masked_first_token
from modeling_gated.training import ungated
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.sink_model import converted, sink_model, windows


@pytest.fixture(scope="module")
def models():
    """The model with a sink, and the one without it."""
    edited = converted(sink_model())
    original = ungated(edited, share_weights=False)
    settings = AbsorptionSettings(window_tokens=64, calibration_tokens=64, refinement_epochs=0)
    absorb_sinks(original, edited, windows(16, 48).split(4), settings)
    return original, edited


def test_a_comparison_is_what_it_says(models) -> None:
    original, edited = models
    tokens = windows(3, 96, seed=5)
    comparison = compare(
        original,
        edited,
        Windows("bytes", "plain", list(tokens)),
        interventions=["masked_first_token@64"],
        examined=2,  # by meters and interventions
    )
    with torch.no_grad():
        expected, logits = (model(tokens).logits[:, :-1].double().log_softmax(-1) for model in models)
        losses = [
            functional.nll_loss(predicted.flatten(0, 1), tokens[:, 1:].flatten()).item()
            for predicted in (expected, logits)
        ]
        kl = (expected.exp() * (expected - logits)).sum(-1)
        plain = original(tokens[:2], labels=tokens[:2]).loss.item()
        with masked_first_token(original, 64):
            masked = original(tokens[:2], labels=tokens[:2]).loss.item()
    assert (comparison.windows, comparison.window_tokens) == (3, 96)
    assert comparison.original.loss == pytest.approx(losses[0], abs=1e-4)
    assert comparison.edited.loss == pytest.approx(losses[1], abs=1e-4)
    assert comparison.perplexity_ratio == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-4)
    assert comparison.kl == pytest.approx(kl.mean().item(), abs=1e-5)
    assert comparison.kl_quantiles["0.9"] == pytest.approx(kl.flatten().quantile(0.9).item(), abs=1e-4)
    assert comparison.kl_by_position[0] == pytest.approx(kl[:, :12].mean().item(), abs=1e-5)
    assert len(comparison.loss_by_position) == 8
    assert comparison.original.interventions["masked_first_token@64"] == pytest.approx(masked - plain, abs=1e-4)
    meter = FirstTokenAttention()
    with torch.no_grad(), inspecting(original, meter):
        original(tokens[:2])
    assert comparison.original.first_token_attention == pytest.approx(meter.result().mean().item(), abs=1e-6)
    assert comparison.original.hidden_state_maximum > 800 > 20 > comparison.edited.hidden_state_maximum


def test_a_model_is_no_other_than_itself(models) -> None:
    comparison = compare(models[0], models[0], Windows("bytes", "plain", list(windows(2, 96))))
    assert comparison.kl == 0
    assert comparison.perplexity_ratio == 1
    assert comparison.original == comparison.edited


def test_a_proof_has_all_kinds_lengths_and_beginnings(models) -> None:
    texts = [Text(kind, [], windows(1, 800, seed).flatten().tolist()) for seed, kind in enumerate(("a", "b"))]
    texts.append(Text("short", [], list(range(20))))
    comparisons = prove(*models, texts, byte_tokenizer())
    assert [
        (comparison.kind, comparison.window_tokens, comparison.start, comparison.windows) for comparison in comparisons
    ] == [(kind, 256, start, 3) for kind in ("a", "b") for start in ("plain", "special token")]
    changed = [comparison for comparison in comparisons if comparison.edited.interventions]
    assert [comparison.start for comparison in changed] == ["special token"] * 2
    for comparison in changed:
        assert list(comparison.original.interventions) == list(INTERVENTIONS)
        assert list(comparison.edited.interventions) == [*INTERVENTIONS, *GATE_INTERVENTIONS]
    quality, sinks = markdown_table(quality_rows(comparisons)), markdown_table(sink_rows(comparisons))
    assert len(quality.splitlines()) == 2 + 4
    assert len({line.replace("\\|", "").count("|") for line in (quality + "\n" + sinks).splitlines()}) == 2
    assert f"{changed[0].original.first_token_attention:.4f} → {changed[0].edited.first_token_attention:.4f}" in sinks


@pytest.mark.parametrize(("count", "expected"), [(2, [(2048, 1), (512, 2)]), (16, [(2304, 1), (2048, 4), (512, 16)])])
def test_there_are_fewer_windows_that_are_longer(
    models, count: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models[0].config, "max_position_embeddings", 2304)
    texts = [Text("a", [], windows(1, 8192).flatten().tolist())]
    comparisons = prove(*models, texts, byte_tokenizer(), windows=count)
    assert list(dict.fromkeys((comparison.window_tokens, comparison.windows) for comparison in comparisons)) == expected

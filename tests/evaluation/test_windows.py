"""Windows are spread over a text, and their mean loss is that of the logits."""

import pytest
import torch
from torch.nn import functional

from modeling_gated.evaluation import windows
from modeling_gated.evaluation.windows import mean_loss, spread_windows
from tests.helpers.gated_models import gated_model


def test_windows_are_spread_over_a_text() -> None:
    cut = spread_windows(range(100), 21, 4, [256])
    assert [window.tolist() for window in cut] == [[256, *range(at, at + 20)] for at in (0, 25, 50, 75)]
    assert len(spread_windows(range(100), 40, 4)) == 2
    assert spread_windows(range(100), 101, 4) == []


@pytest.mark.parametrize("prompts", [None, [1, 5]])
def test_the_mean_loss_is_that_of_the_logits(
    prompts: list[int] | None, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tokens alike, also where windows differ in length and logits come in chunks."""
    monkeypatch.setattr(windows, "_LOGITS", 7)
    model, texts, passes = gated_model(), [tokens[0], tokens[1, :20]], []
    actual = mean_loss(model, texts, prompts=prompts, advance=lambda: passes.append(1))
    losses = []
    for text, prompt in zip(texts, prompts or [1, 1], strict=True):
        with torch.no_grad():
            logits = model(text[None]).logits[0, prompt - 1 : -1].double()
        losses.append(functional.cross_entropy(logits, text[prompt:], reduction="none"))
    assert actual == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert len(passes) == 2

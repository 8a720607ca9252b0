"""What is trained and measured on: kinds of text, what of them is held out, and what a model writes itself."""

from pathlib import Path

import pytest
import torch

from modeling_gated.absorption import AbsorptionError, AbsorptionSettings
from modeling_gated.absorption.sampling import sample_chats, sample_text
from modeling_gated.absorption.texts import (
    Text,
    TrainingWindows,
    default_texts,
    given_texts,
    sampled_text,
)
from modeling_gated.evaluation import EvaluationError
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.sink_model import BOS, sink_model


TOKENIZER = byte_tokenizer(chat=True)


def test_default_texts_are_real_and_held_out_in_part() -> None:
    texts = {text.kind: text for text in default_texts(TOKENIZER)}
    assert list(texts) == ["prose", "documentation", "code"]
    words = {"prose": "Elizabeth", "documentation": "The “for” statement", "code": "def __init__(self"}
    for kind, text in texts.items():
        sections = [TOKENIZER.decode(section) for section in (text.training, text.validation, text.held_out)]
        assert words[kind].replace("“", '"').replace("”", '"') in "".join(sections)
        shares = [len(section) / sum(map(len, sections)) for section in sections]
        assert shares == pytest.approx([0.7, 0.05, 0.25], rel=0.02)
        assert len(text.held_out) > 8192  # enough for the longest windows, whatever the tokenizer
        for number, other in ((2, 0), (2, 1), (1, 0)):  # but for a licence, perhaps
            pieces = [sections[number][at : at + 300] for at in range(0, len(sections[number]) - 300, 300)]
            assert sum(piece in sections[other] for piece in pieces) <= 0.01 * len(pieces)


def test_given_texts(tmp_path: Path) -> None:
    first, second = tmp_path / "laws.txt", tmp_path / "laws.md"
    first.write_text("abcdefgh" * 10, encoding="utf-8")
    second.write_text("other", encoding="utf-8")
    (actual,) = given_texts([first], TOKENIZER)
    assert (actual.kind, len(actual.training), len(actual.validation), len(actual.held_out)) == ("laws", 56, 4, 20)
    with pytest.raises(AbsorptionError, match=r"laws\.md: .*, got laws; rename"):
        given_texts([first, second], TOKENIZER)
    with pytest.raises(EvaluationError, match="No such file"):
        given_texts([tmp_path / "none.txt"], TOKENIZER)


def test_windows_take_turns_and_come_again_from_their_seed() -> None:
    """As many of each kind, none of them with what is held out; half of them begin with the special token."""
    texts = [Text("a", [1] * 200, [9] * 50), Text("only measured", [], [9] * 50), Text("b", [2] * 30, [9] * 50)]
    windows = TrainingWindows(texts, TOKENIZER)
    batch = windows.training_batch(40, 0, 200, seed=3)
    assert batch.shape == (200, 40)
    assert (batch[::2, 1:] == 1).all()
    assert (batch[1::2, 1:] == 2).all()  # which is shorter than a window, and begins again
    assert 70 < (batch[:, 0] == BOS).sum() < 130
    assert torch.equal(windows.training_batch(40, 60, 5, seed=3), batch[60:65])
    assert not torch.equal(windows.training_batch(40, 0, 200, seed=4), batch)


@pytest.mark.parametrize("kinds", [2, 3, 4, 5])
def test_half_of_the_tokens_are_in_long_windows(kinds: int) -> None:
    """And of these, too, and of the others, as many are of each kind."""
    settings = AbsorptionSettings(window_tokens=64, long_window_tokens=384, batch_size=2)
    texts = [Text(str(kind), [kind] * 999, []) for kind in range(kinds)]
    windows = TrainingWindows(texts, TOKENIZER, settings.long_window_tokens, settings.batches_per_long)
    tokens = 2 * 384 * kinds
    actual = [windows.training_batch(64, number * 2, 2, seed=0) for number in range(settings.batches(tokens))]
    assert [tuple(batch.shape) for batch in actual] == [(2, 64), (2, 64), (2, 64), (1, 384)] * kinds
    assert settings.tokens(len(actual)) == windows.tokens(len(actual), 64, 2) == tokens
    assert windows.tokens(3, 64, 2) == 3 * 128
    for batches, expected in ((actual[3::4], 1), ([batch for batch in actual if len(batch) == 2], 6)):
        of_kinds = [row[-1].item() for batch in batches for row in batch]
        assert [of_kinds.count(kind) for kind in range(kinds)] == [expected] * kinds


def test_a_long_window_is_no_longer_than_its_text() -> None:
    texts = [Text("a", list(range(100)), [])]
    windows = TrainingWindows(texts, TOKENIZER, 384, 2)
    assert windows.training_batch(64, 1, 1, seed=0).shape == (1, 100)
    assert windows.training_batch(128, 1, 1, seed=0).shape == (1, 128)
    assert [windows.tokens(4, length, 1) for length in (64, 128)] == [2 * 64 + 2 * 100, 4 * 128]
    assert TrainingWindows(texts, TOKENIZER).tokens(3, 64, 2) == 3 * 128


def test_batches_are_counted() -> None:
    settings = AbsorptionSettings(window_tokens=64, long_window_tokens=384, batch_size=2)
    assert [settings.batches(tokens) for tokens in (127, 128, 767, 768, 896)] == [0, 1, 3, 4, 5]
    without = AbsorptionSettings(window_tokens=64, long_window_tokens=64, batch_size=2)
    assert (without.batches_per_long, without.batches(1000), without.tokens(7)) == (0, 7, 896)
    assert AbsorptionSettings().steps // AbsorptionSettings().evaluate_every > AbsorptionSettings().patience


def test_sampled_sequences_are_held_out_whole() -> None:
    text = sampled_text("chat", [[number] * 3 for number in range(20)])
    parts = [text.training, text.validation, text.held_out]
    assert parts == [
        [number for number in part for _ in range(3)] for part in (range(14), range(14, 15), range(15, 20))
    ]


def test_a_model_writes_text_and_chats() -> None:
    """As many tokens as wanted, the same from the same seed, and torch's own random numbers are left alone."""
    model = sink_model()
    state = torch.get_rng_state()
    for sample in (sample_text, sample_chats):
        actual = sample(model, TOKENIZER, 500, seed=1)
        assert sum(map(len, actual)) >= 500
        assert actual == sample(model, TOKENIZER, 500, seed=1)
        assert actual != sample(model, TOKENIZER, 500, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(BOS not in sequence for sequence in sample_text(model, TOKENIZER, 500, seed=1))
    for chat in sample_chats(model, TOKENIZER, 500, seed=1):
        words = TOKENIZER.decode(chat)
        assert words.startswith("<s>[user] ")
        assert "\n[assistant] " in words


def test_samples_have_the_models_distribution() -> None:
    """Of a model that says one of two tokens after every other, with probabilities of 3/4 and 1/4."""
    model = sink_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[[5, 6]] = 1.0
        model.lm_head.weight[5] += torch.log(torch.tensor(3.0)) / 32
    actual = [token for text in sample_text(model, TOKENIZER, 6000, seed=0) for token in text[1:]]
    assert actual.count(5) / len(actual) == pytest.approx(0.75, abs=0.03)
    assert actual.count(6) / len(actual) == pytest.approx(0.25, abs=0.03)


def test_without_a_chat_template_there_are_no_chats() -> None:
    assert sample_chats(sink_model(), byte_tokenizer(), 500, seed=0) == []

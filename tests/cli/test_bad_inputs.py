"""Every command takes the same inputs through the same checks: one clear line, or a result; nothing is left behind."""

import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from modeling_gated import absorption
from modeling_gated.absorption import AbsorptionError, AbsorptionSettings, absorb_checkpoint, sampling, texts
from modeling_gated.checkpoints.tokenization import check_token_ids, load_tokenizer
from modeling_gated.cli import app
from modeling_gated.conversion import ConversionError, convert_checkpoint
from modeling_gated.errors import TokenizerError
from modeling_gated.evaluation import evaluate_context, plot
from modeling_gated.evaluation.prompts import build_prompt
from modeling_gated.evaluation.tasks import draw
from modeling_gated.inspection import inspect_model
from modeling_gated.inspection.report import page
from tests.helpers.bad_checkpoints import CASES, LINE, LOADING, TEXT, TOKENIZING, in_tokenizer
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.sink_model import sink_model


# Exit codes of verify, and words of its own.
VERIFIED = {
    "all ids beyond": (1, "tokenizer.json: text.txt gives no tokens within the vocabulary of 258"),
    "the first id beyond": (1, "tokenizer.json: text.txt gives no tokens within the vocabulary of 258"),
    "fewer embeddings": (1, "tokenizer.json: text.txt gives no tokens within the vocabulary of 200"),
    "return_dict false": (0, "identical: the same function, bit for bit"),
    "NaN": (1, "max difference    nan"),
    "NaN in the head": (1, "max difference    nan"),
}
SMALL = {
    "calibration_tokens": 128,
    "window_tokens": 64,
    "long_window_tokens": 64,
    "batch_size": 2,
    "refinement_epochs": 0,
    "measured_windows": 1,
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint, its gated conversion and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    sink_model().to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    byte_tokenizer(chat=True).save_pretrained(folder / "checkpoint")
    convert_checkpoint(folder / "checkpoint", folder / "gated")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def small_absorption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absorption, "AbsorptionSettings", partial(AbsorptionSettings, **SMALL))
    for name, tokens in (("_QUESTION", 4), ("_ANSWER", 8), ("_TEXT", 8)):
        monkeypatch.setattr(sampling, name, tokens)
    for name in ("prose", "documentation", "code"):
        monkeypatch.setattr(texts, name, lambda: TEXT)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take longer than the models."""
    monkeypatch.setattr(plot, "plot_context", lambda evaluations, path: None)
    monkeypatch.setattr(page, "as_page", lambda reports: "")


@pytest.fixture
def checkpoint(origin: Path, tmp_path: Path) -> Path:
    return shutil.copytree(origin / "checkpoint", tmp_path / "checkpoint")


def arguments(
    command: str, checkpoint: Path, origin: Path, text: Path | None = None, gated: Path | None = None
) -> list[str]:
    """A quick call of a command, whose output is `out` next to the checkpoint."""
    out, text = checkpoint.parent / "out", text or origin / "text.txt"
    calls = {
        "inspect": f"{checkpoint} --text {text} --windows 2 --length 64 --interventions none --report {out}",
        "evaluate-context": f"{checkpoint} --text {text} --lengths 300,400 --samples 1 --output {out} "
        "--tasks loss,passkey",
        "absorb": f"{checkpoint} {out} --text {text} --distill-tokens 0 --sample-tokens 8",
        "verify": f"{checkpoint} {gated or origin / 'gated'} --text {text} --tokens 40",
        "convert": f"{checkpoint} {out}",
        "extend": f"{checkpoint} {out} --context-length 512",
    }
    return [command, *calls[command].split()]


def run(words: list[str]) -> Result:
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_one_line(result: Result, words: tuple[str, ...]) -> None:
    """Beside it stand at most Transformers' progress bars and log."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line and "Loading weights" not in line]
    assert lines[-1].startswith("error: "), lines
    assert len([line for line in lines if not line.startswith(("Writing model", "[transformers]"))]) == 1, lines
    for word in words:
        assert word in lines[-1], lines


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize("case", list(CASES))
def test_a_checkpoint_is_used_or_refused_in_one_line(case: str, command: str, checkpoint: Path, origin: Path) -> None:
    expected = CASES[case]
    expected.spoil(checkpoint)
    before = set(checkpoint.parent.rglob("*"))
    result = run(arguments(command, checkpoint, origin))
    converts = expected.converts if command == "absorb" else ()
    if converts or command in expected.fails:
        assert_one_line(result, converts or expected.words)
        assert set(checkpoint.parent.rglob("*")) == before
        return
    assert result.exit_code == 0, result.output
    if command == "absorb":
        notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
        assert len(notes) == bool(expected.note)
        assert all(note.startswith("note: no chats were sampled: ") and expected.note in note for note in notes)
    assert not (checkpoint.parent / "out.partial").exists()


@pytest.mark.parametrize("case", list(CASES))
def test_what_can_be_converted_is_verified_or_refused_in_one_line(case: str, checkpoint: Path, origin: Path) -> None:
    """The gated checkpoint is the spoiled one's own conversion, so that both have the same tokenizer."""
    expected = CASES[case]
    expected.spoil(checkpoint)
    before = set(checkpoint.parent.rglob("*"))
    for command in ("convert", "extend"):
        if expected.converts or command in expected.fails:
            assert_one_line(run(arguments(command, checkpoint, origin)), expected.converts or expected.words)
            assert set(checkpoint.parent.rglob("*")) == before
    gated = origin / "gated"
    if not (expected.converts or "convert" in expected.fails):
        assert run(arguments("convert", checkpoint, origin)).exit_code == 0
        gated = checkpoint.parent / "out"
    result = run(arguments("verify", checkpoint, origin, gated=gated))
    if case in VERIFIED:
        assert (result.exit_code, VERIFIED[case][1] in result.output) == (VERIFIED[case][0], True), result.output
    elif expected.converts or "verify" in expected.fails:
        assert_one_line(result, expected.converts or expected.words)
    else:
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["convert", "extend"])
@pytest.mark.parametrize(
    "case", ["no tokenizer", "tokenizer.json not JSON", "needs code", "template syntax", "eos a word"]
)
def test_what_only_copies_a_tokenizer_does_not_read_it(case: str, command: str, checkpoint: Path, origin: Path) -> None:
    CASES[case].spoil(checkpoint)
    assert run(arguments(command, checkpoint, origin)).exit_code == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "code.py"):
        if (checkpoint / name).exists():
            assert (checkpoint.parent / "out" / name).read_bytes() == (checkpoint / name).read_bytes()


TEXTS: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "words.txt: is empty"),
    "blank": (b" \n\n", "words.txt: is empty"),
    "not UTF-8": (b"caf\xe9 " * 100, "words.txt: not UTF-8: invalid continuation byte at byte 3"),
    "UTF-16": ("\ufeffhello".encode("utf-16-le"), "words.txt: not UTF-8: invalid start byte at byte 0"),
    "a folder": (None, "words.txt: Is a directory"),
}


@pytest.mark.parametrize("command", TOKENIZING)
@pytest.mark.parametrize("case", list(TEXTS))
def test_a_text_is_read_alike(case: str, command: str, checkpoint: Path, origin: Path) -> None:
    content, message = TEXTS[case]
    text = checkpoint.parent / "words.txt"
    if content is None:
        text.mkdir()
    else:
        text.write_bytes(content)
    before = set(checkpoint.parent.rglob("*"))
    assert_one_line(run(arguments(command, checkpoint, origin, text)), (message,))
    assert set(checkpoint.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate-context", "words.txt: 1 windows of 400 tokens are more than the 200 tokens of the text"),
        ("absorb", "words.txt: a quarter of the text must be at least a window of 64 tokens, got 200 tokens"),
    ],
)
def test_a_text_that_is_too_short_is_named(command: str, message: str, checkpoint: Path, origin: Path) -> None:
    (checkpoint.parent / "words.txt").write_text("word " * 40)
    assert_one_line(run(arguments(command, checkpoint, origin, checkpoint.parent / "words.txt")), (message,))
    assert not list(checkpoint.parent.glob("out*"))


OPTIONS = {
    "a GPU that is not there": (LOADING, ["--device", "cuda:99"], "--device must be usable by torch, got cuda:99: "),
    "a device of another torch": (LOADING, ["--device", "hpu"], "--device must be usable by torch, got hpu: "),
    "no device": (LOADING, ["--device", "gpu"], "--device must be usable by torch, got gpu: "),
    "a device without numbers": (LOADING, ["--device", "meta"], "--device must be usable by torch, got meta: "),
    "dtype of absorb": (("absorb",), ["--dtype", "int8"], "--dtype must be bfloat16 or float32, got int8"),
    "no windows": (("inspect", "evaluate-context"), ["--windows", "0"], "--windows must be at least 1, got 0"),
    "negative windows": (("inspect", "evaluate-context"), ["--windows", "-1"], "--windows must be at least 1, got -1"),
    "no length": (("inspect",), ["--length", "-5"], "--length must be at least 2, got -5"),
    "negative lengths": (
        ("evaluate-context",),
        ["--lengths", "-3"],
        "--lengths must be numbers of tokens separated by commas, got -3",
    ),
    "endless lengths": (("evaluate-context",), ["--lengths", "9" * 30], "text.txt: 1 windows of 9999"),
    "no samples": (("evaluate-context",), ["--samples", "0"], "--samples must be at least 1, got 0"),
    "no chunk": (("evaluate-context",), ["--chunk-size", "-1"], "--chunk-size must be at least 1, got -1"),
    "no tokens": (("verify",), ["--tokens", "0"], "--tokens must be at least 1, got 0"),
    "negative distillation": (("absorb",), ["--distill-tokens", "-1"], "--distill-tokens must be at least 0, got -1"),
    "negative samples": (("absorb",), ["--sample-tokens", "-1"], "--sample-tokens must be at least 0, got -1"),
    "a seed too large": (
        ("absorb",),
        ["--seed", "9" * 30],
        "--seed must be at least -2**63 and less than 2**64, got 999",
    ),
}


@pytest.mark.parametrize(("case", "command"), [(case, command) for case in OPTIONS for command in OPTIONS[case][0]])
def test_a_wrong_option_gets_one_line(case: str, command: str, checkpoint: Path, origin: Path) -> None:
    _, option, message = OPTIONS[case]
    before = set(checkpoint.parent.rglob("*"))
    assert_one_line(run([*arguments(command, checkpoint, origin), *option]), (message,))
    assert set(checkpoint.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("inspect", ["--dtype", "int8"]),
        ("evaluate-context", ["--dtype", "int8"]),
        ("inspect", ["--windows", "two"]),
        ("verify", ["--tokens", "9" * 20]),
        ("convert", ["--dtype", "int8"]),
    ],
)
def test_a_wrong_choice_is_bad_usage(command: str, option: list[str], checkpoint: Path, origin: Path) -> None:
    before = set(checkpoint.parent.rglob("*"))
    result = run([*arguments(command, checkpoint, origin), *option])
    assert result.exit_code == 2
    assert f"Invalid value for '{option[0]}'" in result.stderr
    assert set(checkpoint.parent.rglob("*")) == before


def test_a_chunk_larger_than_every_input_is_one_pass(checkpoint: Path, origin: Path) -> None:
    words = arguments("evaluate-context", checkpoint, origin)
    assert run([*words, "--chunk-size", "9" * 30]).exit_code == 0


@pytest.mark.parametrize("case", ["one id beyond", "the first id beyond", "no tokens"])
def test_the_functions_raise_one_error(case: str, checkpoint: Path, origin: Path) -> None:
    CASES[case].spoil(checkpoint)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    calls = (
        lambda: inspect_model(model, tokenizer, TEXT, name="tiny", windows=1, window_tokens=64),
        lambda: evaluate_context(model, tokenizer, name="tiny", lengths=[300], text=origin / "text.txt"),
        lambda: absorb_checkpoint(checkpoint, checkpoint.parent / "out", settings=AbsorptionSettings(**SMALL)),
    )
    for call in calls:
        with pytest.raises(TokenizerError) as raised:
            call()
        assert isinstance(raised.value, ConversionError)
        assert CASES[case].words[-1] in str(raised.value)
    assert not list(checkpoint.parent.glob("out*"))


def test_ids_that_only_later_prompts_have_are_refused(checkpoint: Path, origin: Path) -> None:
    """Digits, which the text does not have: what is hidden is drawn again for each prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    first = build_prompt(draw("passkey", random.Random(0), 0.5, TEXT), [LINE], tokenizer, 300, chat=True)
    digit = next(str(number) for number in range(10) if tokenizer.convert_tokens_to_ids(str(number)) not in first)
    in_tokenizer(lambda content: content["model"]["vocab"].update({digit: 2000}))(checkpoint)
    options = {"lengths": [300], "tasks": ["passkey"], "samples": 20, "text": origin / "text.txt"}
    with pytest.raises(TokenizerError, match=rf"below 258, .* got 2000 \('{digit}'\) in a prompt of passkey; use"):
        evaluate_context(model, load_tokenizer(checkpoint), name="tiny", **options)


def test_models_without_embeddings_are_not_checked() -> None:
    check_token_ids(byte_tokenizer(), [10**6], "a text", None)
    check_token_ids(byte_tokenizer(), [], "a text", 1)
    with pytest.raises(TokenizerError, match=r"token ids must be below 1, .* got 1 .* in a text; "):
        check_token_ids(byte_tokenizer(), [0, 1], "a text", 1)


def test_a_generation_config_in_memory_is_checked_too(checkpoint: Path, origin: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    model.generation_config.eos_token_id = "x"
    with pytest.raises(ConversionError, match=r"tiny: generation_config: eos_token_id must be .*, got 'x'"):
        evaluate_context(model, tokenizer, name="tiny", lengths=[300], tasks=["passkey"], text=origin / "text.txt")


def test_a_seed_that_torch_does_not_take_is_refused() -> None:
    for seed in (-(2**63), 2**64 - 1):
        torch.Generator().manual_seed(AbsorptionSettings(seed=seed).seed)
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(AbsorptionError, match=f"got {seed}"):
            AbsorptionSettings(seed=seed)

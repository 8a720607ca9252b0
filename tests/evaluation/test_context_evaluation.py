"""Evaluation of long contexts: losses are the plain ones, prompts hold what is asked for, memory is linear."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from modeling_gated.cli import app
from modeling_gated.conversion import convert_checkpoint
from modeling_gated.evaluation import TASKS, EvaluationError, evaluate_context, loss_by_position
from modeling_gated.evaluation.prompts import build_prompt, lines_of
from modeling_gated.evaluation.tasks import Task, draw
from modeling_gated.evaluation.text import read_text
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.gated_models import VARIANTS, gated_model
from tests.helpers.largest_tensor import Largest
from tests.helpers.tiny_configs import tiny_llama


LINES = lines_of(read_text(None)[0])


def plain_losses(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of one whole forward pass, in float64."""
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].double()
    return -logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


@pytest.mark.fast(only="7")
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_losses_are_those_of_one_forward_pass(variant: str, chunk_size: int, tokens: torch.Tensor) -> None:
    model = gated_model(variant)
    actual = loss_by_position(model, tokens[0], chunk_size=chunk_size)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), plain_losses(model, tokens[0]), rtol=1e-4, atol=1e-5)


def test_no_tensor_grows_with_the_square_of_the_length() -> None:
    """Nor are there float32 logits of the whole text."""
    model = gated_model(vocab_size=258, max_position_embeddings=4096).bfloat16()
    largest = {}
    for length in (1024, 4096):
        with Largest() as largest[length]:
            loss_by_position(model, torch.arange(length) % 258, chunk_size=32)
    assert largest[4096].elements < 4.2 * largest[1024].elements
    assert largest[4096].elements < 4096 * 4096 / 50
    assert largest[4096].float32 < 4096 * 258 / 50


@pytest.mark.fast(only="900")
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("length", [900, 1500])
@pytest.mark.parametrize("name", list(TASKS))
def test_prompts_fill_their_length_and_hold_the_needles(name: str, length: int, chat: bool) -> None:
    tokenizer = byte_tokenizer(chat=chat)
    for depth in (0.0, 0.5, 1.0):
        task = TASKS[name](random.Random(1), depth)
        prompt = build_prompt(task, LINES, tokenizer, length, chat=chat)
        room = length - len(prompt) - task.max_new_tokens
        assert 0 <= room <= max(map(len, LINES[:60]))
        assert prompt.count(256) == 1  # no second beginning
        assert prompt[0] == 256
        text = tokenizer.decode(prompt)
        places = [text.index(needle) for _, needle in task.needles]
        assert all(text.count(needle) == 1 for _, needle in task.needles)
        assert text.endswith(f"{task.question}\n{'[assistant] ' if chat else ''}{task.answer_prefix}")
        inner = text.index(task.question) - text.index(task.instruction)
        assert abs((places[0] - text.index(task.instruction)) / inner - (0.1 + 0.8 * depth)) < 0.35
        for answer in task.answers:
            assert answer in text and not any(answer in line for line in LINES)


def test_a_longer_text_than_the_haystack_is_repeated() -> None:
    task = TASKS["passkey"](random.Random(1), 0.5)
    prompt = build_prompt(task, ["one line", "another"], byte_tokenizer(), 1000, chat=False)
    assert len(prompt) + task.max_new_tokens >= 1000 - len("one line\n")


def test_prompts_that_would_mean_nothing_are_refused() -> None:
    task = TASKS["passkey"](random.Random(1), 0.5)
    with pytest.raises(EvaluationError, match="length 100: question and answer alone take"):
        build_prompt(task, LINES, byte_tokenizer(), 100, chat=False)
    tokenizer = byte_tokenizer()
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: decode(ids).lower()
    with pytest.raises(EvaluationError, match="the tokenizer does not keep 'The pass key is"):
        build_prompt(task, LINES, tokenizer, 1000, chat=False)


def test_text_of_long_lines_fills_prompts_too() -> None:
    """A book in one line, too."""
    task = TASKS["passkey"](random.Random(1), 0.5)
    prompt = build_prompt(task, lines_of(" ".join(LINES)), byte_tokenizer(), 3000, chat=False)
    assert 3000 - 201 <= len(prompt) + task.max_new_tokens <= 3000


def test_a_tokenizer_that_ends_inputs_does_not_end_prompts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    assert tokenizer("a")["input_ids"][-1] == 257
    task = TASKS["passkey"](random.Random(1), 0.5)
    prompt = build_prompt(task, LINES, tokenizer, 1000, chat=False)
    assert prompt[0] == 256
    assert 257 not in prompt


@pytest.mark.parametrize("name", list(TASKS))
def test_what_is_hidden_is_nowhere_else(name: str) -> None:
    first = TASKS[name](random.Random(1), 0.5)
    assert draw(name, random.Random(1), 0.5, "a text") == first
    again = draw(name, random.Random(1), 0.5, f"a text with {first.answers[0]} in it")
    assert again != first
    assert not set(again.hidden) & {first.answers[0]}


def test_scores_count_words_of_their_own() -> None:
    task = Task("", (), "", "", ("123", "ABC"), (), 1)
    assert [task.score(answer) for answer in ("123, ABC.", "ABC", "1234 and xABC", "")] == [1.0, 0.5, 0.0, 0.0]


def test_variables_are_found_by_following_the_assignments() -> None:
    """In the order of the text, too: no variable stands before the one that it is assigned."""
    for seed in range(20):
        task = TASKS["variable_tracking"](random.Random(seed), random.Random(seed).random())
        values: dict[str, str] = {}
        for _, needle in sorted(task.needles, key=lambda needle: needle[0]):
            name, said = needle.removeprefix("VAR ").split(" = ")
            values[name] = values[said.removeprefix("VAR ")] if said.startswith("VAR") else said
        asked = task.question.split("value ")[1].split(" ")[0]
        assert sorted(name for name, value in values.items() if value == asked) == sorted(task.answers)
        assert len(values) == 10


class Reader:
    """Stands for a model that answers as `answer` does of the prompt's text."""

    def __init__(self, tokenizer, answer, max_position_embeddings: int = 1000):
        rope = {"rope_type": "default", "rope_theta": 1e4}
        self.config = SimpleNamespace(max_position_embeddings=max_position_embeddings, rope_parameters=rope)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.tokenizer, self.answer = tokenizer, answer
        self.generation_config = GenerationConfig(repetition_penalty=2.0, num_beams=3, eos_token_id=257)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(258, 1)

    def generate(self, input_ids: torch.Tensor, *, max_new_tokens: int, **_: object) -> torch.Tensor:
        assert not self.generation_config.repetition_penalty and not self.generation_config.num_beams
        assert self.generation_config.eos_token_id == 257
        answer = self.tokenizer(self.answer(self.tokenizer.decode(input_ids[0])), add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, torch.tensor([answer], dtype=torch.int64)], 1)


@pytest.mark.fast
def test_who_reads_to_the_needle_scores() -> None:
    """A reader of the first part of the prompt finds what lies there; depths are spread over the whole."""
    tokenizer = byte_tokenizer()

    def reads(share: float):
        return lambda text: text[: int(share * len(text))].replace("What is", "")

    for share, expected in ((1.0, 1.0), (0.5, 0.5), (0.0, 0.0)):
        model = Reader(tokenizer, reads(share))
        options = {"name": "reader", "lengths": [1000, 2000], "tasks": ["passkey"], "samples": 10}
        evaluation = evaluate_context(model, tokenizer, **options)
        for score in evaluation.scores:
            assert score.score == pytest.approx(expected, abs=0.11)
            assert score.length - 120 < score.prompt_tokens <= score.length - 16
        assert evaluation.beyond == (2000,)
        assert model.generation_config.repetition_penalty == 2.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint with a tokenizer of bytes, and its gated conversion."""
    root = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(0)
    config = tiny_llama(vocab_size=258, max_position_embeddings=1024)
    LlamaForCausalLM(config).save_pretrained(root / "plain")
    byte_tokenizer(chat=True).save_pretrained(root / "plain")
    convert_checkpoint(root / "plain", root / "gated")
    return root / "plain", root / "gated"


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate-context", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_compares_checkpoints(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """A gated conversion's numbers are its source's; all is in the table, the JSON file and the picture."""
    code, out, _ = run(*checkpoints, "--lengths", "800,1600", "--samples", 2, "--output", tmp_path / "new" / "found")
    assert code == 0
    content = json.loads((tmp_path / "new" / "found" / "context.json").read_text())
    assert (tmp_path / "new" / "found" / "context.png").read_bytes().startswith(b"\x89PNG")
    plain, gated = content["evaluations"]
    for actual, path in ((plain, checkpoints[0]), (gated, checkpoints[1])):
        assert (actual["name"], actual["lengths"], actual["beyond"]) == (path.name, [800, 1600], [1600])
        assert actual["chat_template"] is True
        tokens = byte_tokenizer()(read_text(None)[0])["input_ids"][:1600]
        losses = plain_losses(AutoModelForCausalLM.from_pretrained(path), torch.tensor(tokens))
        expected = [losses[:799].mean().item(), losses[799:].mean().item()]
        assert [bucket["loss"] for bucket in actual["losses"]] == pytest.approx(expected, rel=1e-5)
        assert [bucket["tokens"] for bucket in actual["losses"]] == [799, 800]
        assert f"{expected[0]:.3f}" in out and f"{expected[1]:.3f}*" in out
    assert [bucket["loss"] for bucket in gated["losses"]] == pytest.approx(
        [bucket["loss"] for bucket in plain["losses"]], rel=1e-6
    )
    assert plain["scores"] == gated["scores"]
    assert {score["task"] for score in plain["scores"]} == set(TASKS)
    assert all(score["prompt_tokens"] <= score["length"] for score in plain["scores"])
    code, _, err = run(checkpoints[0], "--output", tmp_path / "new" / "found")
    assert code == 1
    assert err == f"error: {tmp_path / 'new' / 'found' / 'context.json'}: already exists; --overwrite replaces it\n"


BAD = {
    "no number": (["--lengths", "1k"], "--lengths must be numbers of tokens separated by commas, got 1k"),
    "length 1": (
        ["--lengths", "1,800"],
        "--lengths must be different numbers of tokens, each at least 2, got [1, 800]",
    ),
    "twice": (
        ["--lengths", "800,800"],
        "--lengths must be different numbers of tokens, each at least 2, got [800, 800]",
    ),
    "unknown task": (["--tasks", "loss,needle"], "--tasks must be among loss, passkey"),
    "no samples": (["--samples", "0"], "--samples must be at least 1, got 0"),
    "no text": (["--text", "/nowhere.txt"], "/nowhere.txt: No such file"),
    "text too short": (["--lengths", "800000", "--tasks", "loss"], "1 windows of 800000 tokens are more than the"),
    "no room": (["--lengths", "100", "--tasks", "passkey"], "length 100: question and answer alone take"),
    "device": (["--device", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_nonsense_gets_one_clear_line(case: str, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    arguments, words = BAD[case]
    code, out, err = run(checkpoints[1], *arguments, "--output", tmp_path / "found")
    assert code == 1
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and words in last, err
    assert not list(tmp_path.iterdir())


def test_models_that_would_be_random_are_refused(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """And what is no directory with safetensors."""
    gated = AutoModelForCausalLM.from_pretrained(checkpoints[1])
    gated.model.save_pretrained(tmp_path / "headless")
    byte_tokenizer().save_pretrained(tmp_path / "headless")
    code, _, err = run(tmp_path / "headless", "--lengths", "800")
    assert code == 1
    assert err.splitlines()[-1].startswith(
        f"error: {tmp_path / 'headless'}: must have all weights, got no lm_head.weight; "
    )
    code, _, err = run(tmp_path / "nowhere" / "at" / "all", "--lengths", "800")
    assert code == 1
    assert "no such file or directory" in err
    for name, reason in (
        ("model.gguf", "not a complete GGUF file"),
        ("model.bin", "must be a directory with a checkpoint"),
    ):
        (tmp_path / name).write_bytes(b"GGUF")
        code, _, err = run(tmp_path / name, "--lengths", "800")
        assert code == 1
        assert f"{name}: {reason}" in err
    lost = gated.state_dict() | {"model.layers.0.self_attn.g_proj.bias": None}
    gated.save_pretrained(
        tmp_path / "lost", state_dict={name: tensor for name, tensor in lost.items() if tensor is not None}
    )
    byte_tokenizer().save_pretrained(tmp_path / "lost")
    code, _, err = run(tmp_path / "lost", "--lengths", "800", "--chat")
    assert code == 1
    lost_bias = "must have all weights, got no model.layers.0.self_attn.g_proj.bias; "
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'lost'}: {lost_bias}")


def test_a_template_that_is_not_there_cannot_be_used(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints[0], tmp_path / "plain")
    byte_tokenizer().save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    code, _, err = run(tmp_path / "plain", "--lengths", "800", "--chat")
    assert code == 1
    assert err.splitlines()[-1] == "error: plain: its tokenizer has no chat template"
    code, _, err = run(checkpoints[0], tmp_path / "plain", "--lengths", "800", "--tasks", "loss")
    assert code == 0
    assert "others plain text; set --chat or --no-chat" in err


def test_what_was_found_is_kept_when_the_next_one_fails(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is interrupted. Paths are looked at before anything is measured, what they hold when their turn comes."""
    options = ("--lengths", "800", "--tasks", "loss", "--output", tmp_path / "found")
    code, _, err = run(checkpoints[0], tmp_path / "nowhere" / "at" / "all", *options)
    assert code == 1
    assert not (tmp_path / "found").exists()
    shutil.copytree(checkpoints[0], tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{}")
    code, _, err = run(checkpoints[0], tmp_path / "damaged", *options)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'damaged'}")
    content = json.loads((tmp_path / "found" / "context.json").read_text())
    assert [evaluation["name"] for evaluation in content["evaluations"]] == ["plain"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for places, left in (
        ("found", f"results measured so far are in {tmp_path}/found/context.json"),
        ("none", "nothing"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr("modeling_gated.cli.context.load_model", interrupt)
            code, _, err = run(checkpoints[0], *options[:-1], tmp_path / places, "--overwrite")
        assert code == 130
        assert err.startswith(f"error: interrupted; {left}")
    code, _, err = run(checkpoints[0], *options[:-1], tmp_path / "damaged" / "config.json" / "below")
    assert code == 1
    assert "is not a writable directory" in err

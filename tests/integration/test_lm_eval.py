"""lm_eval finds of a gated checkpoint what its logits say, from the command line and in the same process."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.gated_models import gated_model
from tests.helpers.processes import run_program


pytest.importorskip("lm_eval")

TEXTS = ["Four gates, and every one of them moved.", "The first token is not a sink."]
QUESTIONS = [
    {"question": f"{first} and {second} is", "choices": ["one", "seven", "of no use"], "answer": answer}
    for first, second, answer in [(1, 2, 0), (3, 4, 1), (5, 6, 2), (7, 8, 1), (9, 9, 0), (2, 5, 1)]
]
PERPLEXITY = """
task: gated_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
CHOICE = """
task: gated_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = gated_model("headwise", vocab_size=258, bos_token_id=256, eos_token_id=257, pad_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # so that tokens are not all as likely
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, lines in (("TEXTS", [{"text": text} for text in TEXTS]), ("QUESTIONS", QUESTIONS)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    for name, task in (("perplexity", PERPLEXITY), ("choice", CHOICE)):
        for file in ("TEXTS", "QUESTIONS"):
            task = task.replace(file, str(folder / f"{file}.jsonl"))
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return folder


def log_probability(model: PreTrainedModel, before: list[int], tokens: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *tokens]])).logits[0].double().log_softmax(-1)
    return sum(logits[len(before) - 1 + number, token].item() for number, token in enumerate(tokens))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, float]:
    """By hand, from logits."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)

    def encode(text: str) -> list[int]:
        return byte_tokenizer()(text, add_special_tokens=False).input_ids

    texts = sum(log_probability(model, [256], encode(text)) for text in TEXTS)
    right = 0
    for line in QUESTIONS:
        chances = [log_probability(model, encode(line["question"]), encode(f" {choice}")) for choice in line["choices"]]
        right += chances.index(max(chances)) == line["answer"]
    perplexity = math.exp(-texts / sum(len(text.encode()) for text in TEXTS))
    return {"gated_perplexity": perplexity, "gated_choice": right / len(QUESTIONS)}


def check(results: dict, expected: dict[str, float]) -> None:
    assert results["gated_perplexity"]["byte_perplexity,none"] == pytest.approx(expected["gated_perplexity"], rel=1e-4)
    assert results["gated_choice"]["acc,none"] == pytest.approx(expected["gated_choice"])


def test_from_the_command_line(checkpoint: Path, tasks: Path, expected: dict[str, float], tmp_path: Path) -> None:
    """By the code that the checkpoint carries."""
    flags: dict[str, str | Path] = {
        "model": "hf",
        "device": "cpu",
        "model_args": f"pretrained={checkpoint},dtype=float32,add_bos_token=False",
        "tasks": "gated_perplexity,gated_choice",
        "include_path": tasks,
        "output_path": tmp_path / "results",
        "batch_size": "2",
    }
    command = [Path(sys.executable).with_name("lm_eval"), "--trust_remote_code"]
    command += [word for name, value in flags.items() for word in (f"--{name}", value)]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = run_program("without_package.py", *command, env=os.environ | home, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (actual,) = (tmp_path / "results").rglob("results_*.json")
    check(json.loads(actual.read_text(encoding="utf-8"))["results"], expected)


def test_in_the_same_process(
    checkpoint: Path, tasks: Path, expected: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, add_bos_token=False)
    names = ["gated_perplexity", "gated_choice"]
    evaluation = simple_evaluate(
        model, tasks=names, task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0
    )
    check(evaluation["results"], expected)

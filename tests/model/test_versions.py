"""The version of Transformers is checked when the model is imported, from the package or from a checkpoint's code."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from modeling_gated import GatedLlamaConfig
from modeling_gated.configuration.configuration_gated_llama import TESTED_VERSIONS


def start(version: str, code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter whose Transformers says that it is of this version."""
    pretend = f"import transformers; transformers.__version__ = {version!r}\n"
    environment = {**os.environ, "HF_HOME": str(home)}
    return subprocess.run([sys.executable, "-c", pretend + code], capture_output=True, text=True, env=environment)


@pytest.fixture(params=["package", "carried"])
def code(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "package":
        return "import modeling_gated"
    GatedLlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    load = f"transformers.AutoConfig.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)"
    return f"import sys; sys.modules['modeling_gated'] = None\n{load}; {load}"


def test_an_older_transformers_is_an_error(code: str, tmp_path: Path) -> None:
    finished = start("5.16.0", code, tmp_path / "home")
    assert finished.returncode == 1
    assert finished.stderr.strip().endswith("ImportError: GatedLlama needs transformers>=5.16.1, found 5.16.0")


@pytest.mark.parametrize(("version", "warnings"), [("5.24.9", 0), ("5.25.0", 1), ("6.0.0.dev0", 1)])
def test_a_newer_transformers_is_one_warning(version: str, warnings: int, code: str, tmp_path: Path) -> None:
    finished = start(version, code, tmp_path / "home")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("GatedLlama was tested with transformers 5.16.1 to 5.24, found") == warnings
    assert finished.stderr.count(version) == warnings


def test_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    command = "import sys; sys.argv = ['gated-llama', 'convert', 'a', 'b']; from modeling_gated.cli import app; app()"
    finished = start("5.16.0", command, tmp_path / "home")
    assert finished.returncode == 1
    assert finished.stderr == "error: GatedLlama needs transformers>=5.16.1, found 5.16.0\n"


def test_pip_and_readme_ask_for_the_same_versions() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert "transformers>=5.16.1" in project["dependencies"]
    assert "transformers==5.16.1" in (root / "tests" / "oldest.txt").read_text().split()
    assert "transformers==5.23.0" in (root / "tests" / "previous.txt").read_text().split()
    assert "transformers==5.24.0" in (root / "constraints.txt").read_text().split()
    assert TESTED_VERSIONS == "5.16.1 to 5.24"
    assert "Transformers 5.16.1 and later. It is tested with 5.16.1, 5.23 and 5.24" in (root / "README.md").read_text()

"""The version of Transformers is checked when the model is imported, from the package or from a checkpoint's code."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

from modeling_gated import GatedLlamaConfig
from modeling_gated.configuration.configuration_gated_llama import TESTED_VERSIONS
from tests.helpers.processes import PROGRAMS, run_program


def start(version: str, what: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Import the package, the command, or a folder's code where Transformers reports this version."""
    launcher = [] if what in ("package", "command") else ["without_package.py"]
    command = [*launcher, PROGRAMS / "import_with_version.py", version, what]
    return run_program(*command, env={**os.environ, "HF_HOME": str(home)})


@pytest.fixture(params=["package", "carried"])
def what(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "carried":
        GatedLlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
        return str(tmp_path)
    return "package"


def test_an_older_transformers_is_an_error(what: str, tmp_path: Path) -> None:
    finished = start("5.16.0", what, tmp_path / "home")
    assert finished.returncode == 1
    assert finished.stderr.strip().endswith("ImportError: GatedLlama needs transformers>=5.16.1, found 5.16.0")


@pytest.mark.parametrize(("version", "warnings"), [("5.24.9", 0), ("5.25.0", 1), ("6.0.0.dev0", 1)])
def test_a_newer_transformers_is_one_warning(version: str, warnings: int, what: str, tmp_path: Path) -> None:
    finished = start(version, what, tmp_path / "home")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("GatedLlama was tested with transformers 5.16.1 to 5.24, found") == warnings
    assert finished.stderr.count(version) == warnings


def test_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    finished = start("5.16.0", "command", tmp_path / "home")
    assert finished.returncode == 1
    assert finished.stderr == "error: GatedLlama needs transformers>=5.16.1, found 5.16.0\n"


def test_pip_and_documents_ask_for_the_same_versions() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert "transformers>=5.16.1" in project["dependencies"]
    assert "transformers==5.16.1" in (root / "tests" / "oldest.txt").read_text().split()
    assert "transformers==5.23.0" in (root / "tests" / "previous.txt").read_text().split()
    assert "transformers==5.24.0" in (root / "constraints.txt").read_text().split()
    assert TESTED_VERSIONS == "5.16.1 to 5.24"
    assert "Transformers 5.16.1 to 5.24" in (root / "README.md").read_text()
    families = " ".join((root / "docs" / "families.md").read_text().split())
    assert "Transformers 5.16.1 and later, and is tested with 5.16.1, 5.23 and 5.24" in families

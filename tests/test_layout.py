"""configuration/ and conversion/ lie at the top of a clone and are imported as parts of modeling_gated."""

import ast
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import run_program


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules that only some functions import, and the extras that provide them.
OPTIONAL = {"matplotlib": "plot", "peft": "peft"}
UNDECLARED = {"vllm"}  # vLLM itself imports the plugin
# A room imports rooms before it. "model" stands for the modules of modeling_gated/ itself.
ORDER = (
    *("configuration", "model", "training", "checkpoints", "evaluation", "conversion", "inspection", "absorption"),
    "cli",
)


@pytest.mark.parametrize("links", [True, False], ids=["links", "text files, as on Windows"])
def test_import_from_a_clone(tmp_path: Path, links: bool) -> None:
    names = ("configuration", "conversion")
    for name in ("modeling_gated", *names):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    if not links:
        for name in names:
            link = tmp_path / "modeling_gated" / name
            target = os.readlink(link)
            link.unlink()
            link.write_text(target)
    done = run_program("locate_conversion.py", env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"})
    file, module = done.stdout.split()
    assert Path(file).resolve() == tmp_path.resolve() / "conversion" / "__init__.py"
    assert module == "modeling_gated.errors"


@pytest.mark.fast
def test_all_folders_are_in_the_wheel() -> None:
    folders = {
        path.parent.relative_to(ROOT) for name in names_of_rooms() for path in (ROOT / name).rglob("__init__.py")
    }
    packages = {".".join(folder.parts).removeprefix("modeling_gated.") for folder in folders}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.removeprefix("modeling_gated.") for name in declared} == packages


def names_of_rooms() -> tuple[str, ...]:
    return ("modeling_gated", "configuration", "conversion")


@pytest.mark.fast
def test_every_direct_import_is_declared() -> None:
    required = distributions(PROJECT["dependencies"])
    assert imported_modules() - UNDECLARED - OPTIONAL.keys() == required


@pytest.mark.fast
@pytest.mark.parametrize("module", OPTIONAL)
def test_optional_imports_are_declared_in_extras(module: str) -> None:
    assert module in imported_modules()
    assert module in distributions(PROJECT["optional-dependencies"][OPTIONAL[module]])


def imported_modules() -> set[str]:
    """Return the top-level modules of other projects that the package imports."""
    modules = {module.partition(".")[0] for _, module in imports()}
    return modules - sys.stdlib_module_names - {"modeling_gated"}


def imports() -> Iterator[tuple[Path, str]]:
    """Yield the files of the package, each with the full name of a module that the file imports."""
    for name in names_of_rooms():
        for path in sorted((ROOT / name).rglob("*.py")):
            package = ["modeling_gated", *path.relative_to(ROOT).parts[:-1]]
            package = package[1:] if name == "modeling_gated" else package
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from ((path, alias.name) for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    start = package[: len(package) - node.level + 1] if node.level else []
                    yield path, ".".join([*start, node.module] if node.module else start)


@pytest.mark.fast
def test_rooms_import_only_the_rooms_before_them() -> None:
    init = ROOT / "modeling_gated" / "__init__.py"  # exports names of several rooms, and imports them lazily
    backwards = {
        f"{path.relative_to(ROOT)}: {module}"
        for path, module in imports()
        if module.startswith("modeling_gated.") and path != init
        if ORDER.index(room(module.split(".")[1])) > ORDER.index(room(*path.relative_to(ROOT).parts[:-1]))
    }
    assert backwards == set()


def room(*folders: str) -> str:
    return next((name for name in folders if name in ORDER), "model")


def distributions(requirements: list[str]) -> set[str]:
    """Return the names in requirements. Each of them is also the name of the module that is imported."""
    return {re.split(r"[<>=\[ ]", requirement)[0] for requirement in requirements}

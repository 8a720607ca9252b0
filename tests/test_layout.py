"""configuration/ and conversion/ lie at the top of a clone and are imported as parts of modeling_gated."""

import os
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.helpers.processes import run_program


ROOT = Path(__file__).parents[1]


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


def test_all_folders_are_in_the_wheel() -> None:
    folders = {
        path.parent.relative_to(ROOT) for name in names_of_rooms() for path in (ROOT / name).rglob("__init__.py")
    }
    packages = {".".join(folder.parts).removeprefix("modeling_gated.") for folder in folders}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.removeprefix("modeling_gated.") for name in declared} == packages


def names_of_rooms() -> tuple[str, ...]:
    return ("modeling_gated", "configuration", "conversion")

"""The code that a checkpoint carries is replaced by this version's, and nothing else is."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.cli import app
from modeling_gated.configuration import carried_source_files
from modeling_gated.configuration.configuration_gated_llama import CARRIED_MODULES
from modeling_gated.conversion import (
    ConversionError,
    extend_checkpoint,
    refresh_code,
    ungate_checkpoint,
    verify_checkpoint,
)
from tests.helpers.cache_by_version import NAME
from tests.helpers.checkpoints import contents
from tests.helpers.gated_models import gated_model
from tests.helpers.processes import run_isolated


OLD_CODE = Path(__file__).parents[1] / "data" / "carried_code_0c79f5e"
CODE_FILES = tuple(CARRIED_MODULES)
OLD_FILES = ("configuration_gated_llama.py", "modeling_gated_llama.py")
MANIFEST = "gated_llama_manifest.json"


@pytest.fixture
def old(gated: Path) -> Path:
    """A conversion as version 0c79f5e wrote it: with that version's two files, and their hashes in the manifest."""
    manifest = json.loads((gated / MANIFEST).read_text())
    for name in CODE_FILES:
        (gated / name).unlink()
        del manifest["files"][name]
    for name in OLD_FILES:
        shutil.copy(OLD_CODE / name, gated / name)
        content = (OLD_CODE / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (gated / MANIFEST).write_text(json.dumps(manifest))
    return gated


def generated_without_the_package(checkpoint: Path) -> list[int]:
    finished = run_isolated("generate_tokens.py", checkpoint)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_an_old_checkpoint_generates_rightly_again(llama: Path, old: Path) -> None:
    """With the package at once, as its code is not the one that runs; without it after the refresh."""
    source = AutoModelForCausalLM.from_pretrained(llama)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = source.generate(torch.arange(1, 25)[None], **options)
    for trust in (None, True):
        model = AutoModelForCausalLM.from_pretrained(old, trust_remote_code=trust)
        assert type(model) is GatedLlamaForCausalLM
        assert torch.equal(model.generate(torch.arange(1, 25)[None], **options), expected)
    if NAME == "cache":  # the fault of that version, on Transformers 5.24 and later
        assert generated_without_the_package(old) != expected[0, 24:].tolist()
    assert refresh_code(old).files == CODE_FILES
    assert generated_without_the_package(old) == expected[0, 24:].tolist()


@pytest.mark.fast
def test_nothing_else_is_touched(llama: Path, old: Path, tmp_path: Path) -> None:
    verify_checkpoint(llama, old)
    before, stamps = contents(old), {path.name: path.stat().st_mtime_ns for path in old.iterdir()}
    done = refresh_code(old)
    assert done.directory == old and done.files == CODE_FILES
    after = contents(old)
    assert {name for name in after if after[name] != before.get(name)} == {*CODE_FILES, MANIFEST}
    assert after.keys() == before.keys() | set(CODE_FILES)
    unchanged = before.keys() - {*CODE_FILES, MANIFEST}
    assert all((old / name).stat().st_mtime_ns == stamps[name] for name in unchanged)
    for name, source in carried_source_files():
        assert (old / name).read_text() == source
    manifest = json.loads((old / MANIFEST).read_text())
    assert manifest["verification"] is None  # it was of the old code
    assert {name: manifest["files"][name]["sha256"] for name in CODE_FILES} == {
        name: after[name] for name in CODE_FILES
    }
    verification = verify_checkpoint(llama, old)
    assert verification.passed and verification.changed_code == verification.outdated_code == ()
    ungate_checkpoint(old, tmp_path / "ungated")
    assert contents(tmp_path / "ungated") == contents(llama)


def test_an_old_checkpoint_needs_no_new_files(llama: Path, old: Path, tmp_path: Path) -> None:
    """It is extended and ungated as it is, and its extension is refreshed as well."""
    before = contents(old)
    ungate_checkpoint(old, tmp_path / "ungated")
    assert contents(tmp_path / "ungated") == contents(llama)
    extend_checkpoint(old, tmp_path / "extended", context={"length": 4096})
    assert contents(old) == before
    assert {path.name for path in (tmp_path / "extended").glob("*.py")} == set(OLD_FILES)
    assert refresh_code(tmp_path / "extended").files == CODE_FILES
    verification = verify_checkpoint(llama, tmp_path / "extended")
    assert verification.passed and verification.changed_code == verification.outdated_code == ()
    ungate_checkpoint(tmp_path / "extended", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(llama)


def test_a_file_of_the_source_is_kept_for_ungate(llama: Path, old: Path, tmp_path: Path) -> None:
    """A file whose name the code did not have when its checkpoint was converted."""
    for directory in (llama, old):
        (directory / "lookups_gated_llama.py").write_text("# the source's")
    manifest = json.loads((old / MANIFEST).read_text())
    record = {"size": 14, "sha256": hashlib.sha256(b"# the source's").hexdigest(), "source": "lookups_gated_llama.py"}
    manifest["files"]["lookups_gated_llama.py"] = record
    (old / MANIFEST).write_text(json.dumps(manifest))
    assert verify_checkpoint(llama, old).changed_code == ()
    assert refresh_code(old).files == CODE_FILES
    assert verify_checkpoint(llama, old).passed
    ungate_checkpoint(old, tmp_path / "ungated")
    assert contents(tmp_path / "ungated") == contents(llama)


def test_verification_says_that_the_code_is_of_another_version(llama: Path, old: Path) -> None:
    verification = verify_checkpoint(llama, old)
    assert verification.passed and verification.outdated_code == CODE_FILES
    assert verification.verdict.startswith("identical") and verification.verdict.endswith(
        "not by the code in the checkpoint"
    )
    assert verification.summary()["code"].startswith(
        f"{', '.join(CODE_FILES)} of another version, which may generate wrong"
    )


def test_current_code_is_left_alone(gated: Path) -> None:
    before = contents(gated)
    assert refresh_code(gated).files == ()
    assert contents(gated) == before


def test_any_saved_model_is_refreshed(tmp_path: Path) -> None:
    """A trainer's checkpoint has no manifest; a missing file is written."""
    model = gated_model()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "configuration_gated_llama.py").unlink()
    shutil.copy(OLD_CODE / "modeling_gated_llama.py", tmp_path / "saved" / "modeling_gated_llama.py")
    assert refresh_code(tmp_path / "saved").files == OLD_FILES
    expected = model.generate(torch.arange(1, 25)[None], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert generated_without_the_package(tmp_path / "saved") == expected[0, 24:].tolist()
    assert not (tmp_path / "saved" / MANIFEST).exists()


@pytest.mark.parametrize("is_missing", [False, True])
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
@pytest.mark.parametrize("fails_at", [0, 1, 4, 6])
def test_a_failure_leaves_the_old_code(
    step: str, fails_at: int, is_missing: bool, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full from some write on, or a replacement that fails: of a source file or the manifest."""
    if is_missing:
        (old / "configuration_gated_llama.py").unlink()
    before = contents(old)
    function, calls = (Path.write_bytes if step == "write_bytes" else os.replace), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > fails_at and (step == "write_bytes" or calls == fails_at + 1):
            raise OSError(28, "No space left on device", str(arguments[0]))
        return function(*arguments)

    monkeypatch.setattr(*((Path, step) if step == "write_bytes" else (os, step)), failing)
    with pytest.raises(ConversionError, match="No space left on device"):
        refresh_code(old)
    monkeypatch.undo()
    assert contents(old) == before


def test_old_content_that_cannot_be_put_back_is_kept(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(old)
    replace_file, calls = os.replace, 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:  # the new file, and the first that had old content, are in place
            raise OSError(5, "Input/output error", str(arguments[0]))
        replace_file(*arguments)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ConversionError, match="Input/output error"):
        refresh_code(old)
    assert before["configuration_gated_llama.py"] in contents(old).values()


def test_code_that_was_replaced_by_hand_is_recorded(llama: Path, old: Path) -> None:
    for name, source in carried_source_files():
        (old / name).write_text(source)
    assert not verify_checkpoint(llama, old).passed
    assert refresh_code(old).files == ()
    assert verify_checkpoint(llama, old).passed


def test_a_checkpoint_without_code_has_none_that_is_old(llama: Path, gated: Path) -> None:
    """Unless its config names it."""
    (gated / MANIFEST).unlink()
    for name in CODE_FILES:
        (gated / name).unlink()
    assert verify_checkpoint(llama, gated).outdated_code == CODE_FILES
    config = json.loads((gated / "config.json").read_text())
    del config["auto_map"]
    (gated / "config.json").write_text(json.dumps(config))
    assert verify_checkpoint(llama, gated).outdated_code == ()


def test_a_linked_file_stays_a_link(old: Path) -> None:
    (old / "code").mkdir()
    (old / "modeling_gated_llama.py").rename(old / "code" / "model.py")
    (old / "modeling_gated_llama.py").symlink_to("code/model.py")
    refresh_code(old)
    assert (old / "modeling_gated_llama.py").is_symlink()
    assert (old / "code" / "model.py").read_text() == dict(carried_source_files())["modeling_gated_llama.py"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("no directory", r"nowhere: no such directory; download a copy of a model on the hub: hf download"),
        ("not gated", r"config\.json: model_type must be gated_llama, got 'llama'"),
        ("no config", r"config\.json: no such file"),
        ("no code", r"config\.json: auto_map must name modeling_gated_llama, got None"),
        ("damaged manifest", r"gated_llama_manifest\.json: not valid JSON"),
        ("hub cache", r"lies in the hub's cache, which is shared; download a copy"),
    ],
)
def test_what_cannot_be_refreshed_is_one_line(spoil: str, message: str, llama: Path, old: Path, tmp_path: Path) -> None:
    target = old
    if spoil == "no directory":
        target = tmp_path / "nowhere"
    elif spoil == "not gated":
        target = llama
    elif spoil == "no config":
        (old / "config.json").unlink()
    elif spoil == "no code":
        config = json.loads((old / "config.json").read_text())
        del config["auto_map"]
        (old / "config.json").write_text(json.dumps(config))
    elif spoil == "damaged manifest":
        (old / MANIFEST).write_text("{")
    elif spoil == "hub cache":
        target = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("a" * 40)
        shutil.copytree(old, target)
    before = contents(target) if target.exists() else {}
    with pytest.raises(ConversionError, match=message):
        refresh_code(target)
    assert (contents(target) if target.exists() else {}) == before


def test_the_command(llama: Path, old: Path, tmp_path: Path) -> None:
    verify_checkpoint(llama, old)
    result = CliRunner().invoke(app, ["refresh-code", str(old)])
    assert result.exit_code == 0
    assert result.stderr == "note: the model card's verification is for the old code; run gated-llama verify again\n"
    assert f"replaced          {', '.join(CODE_FILES)}" in result.stdout
    result = CliRunner().invoke(app, ["refresh-code", str(old)])
    assert "replaced          nothing: the code is up to date" in result.stdout
    result = CliRunner().invoke(app, ["refresh-code", str(tmp_path / "nowhere")])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1

"""Where sources may lie: on the hub (its cache), behind links, and where not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_gated.conversion import ConversionError, convert_checkpoint, verify_checkpoint


COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with owner/name at two commits, laid out as huggingface_hub does, and no network."""
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for commit, branch in ((COMMIT, "main"), (OLDER, "v1")):
        (repository / "refs" / branch).write_text(commit)
        (repository / "snapshots" / commit / "extra").mkdir(parents=True)
        for number, path in enumerate(sorted(llama.iterdir())):
            blob = f"{number:064}" if path.suffix == ".safetensors" else f"{commit[0]}{number:039}"
            (repository / "blobs" / blob).write_bytes(path.read_bytes())
            (repository / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{blob}")
        (repository / "snapshots" / commit / "extra" / "notes.txt").symlink_to(f"../../../blobs/{commit[0]}{0:039}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return repository


@pytest.mark.parametrize(("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", OLDER), (OLDER, OLDER)])
def test_a_hub_id_with_its_revision(
    hub: Path, llama: Path, tmp_path: Path, tokens: torch.Tensor, revision: str | None, commit: str
) -> None:
    convert_checkpoint("owner/name", tmp_path / "gated", revision=revision)
    assert not any(path.is_symlink() for path in (tmp_path / "gated").rglob("*"))
    assert (tmp_path / "gated" / "extra" / "notes.txt").is_file()
    manifest = json.loads((tmp_path / "gated" / "gated_llama_manifest.json").read_text())
    assert (manifest["source"]["repo_id"], manifest["source"]["revision"]) == ("owner/name", commit)
    card = (tmp_path / "gated" / "README.md").read_text()
    assert "base_model: owner/name\n" in card and f"| revision | {commit} |" in card
    if revision is not None:
        assert f"--revision {revision}" in card
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (llama, tmp_path / "gated")]
    assert torch.equal(*logits)
    assert verify_checkpoint("owner/name", tmp_path / "gated", revision=revision).passed


def test_a_model_with_pickled_weights_alone(hub: Path, tmp_path: Path) -> None:
    (hub / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"owner/name: has no safetensors weights on the hub.*save_pretrained"):
        convert_checkpoint("owner/name", tmp_path / "gated")


def test_links_to_blobs_are_resolved_before_they_are_placed(hub: Path, tmp_path: Path) -> None:
    convert_checkpoint("owner/name", tmp_path / "gated", place="link")
    shard = tmp_path / "gated" / "model-00001-of-00002.safetensors"
    assert not shard.is_symlink()
    assert os.path.samefile(shard, hub / "snapshots" / COMMIT / "model.safetensors")


def test_the_cache_is_known_by_its_path_too(hub: Path, tmp_path: Path) -> None:
    for number, path in enumerate((hub / "snapshots" / OLDER, hub / "snapshots" / OLDER / "model.safetensors")):
        convert_checkpoint(path, tmp_path / str(number))
        manifest = json.loads((tmp_path / str(number) / "gated_llama_manifest.json").read_text())
        assert (manifest["source"]["repo_id"], manifest["source"]["revision"]) == ("owner/name", OLDER)


def test_a_verification_leaves_the_cache_alone(hub: Path, llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    snapshot = hub / "snapshots" / ("c" * 40)
    (tmp_path / "gated").rename(snapshot)
    before = {path.name: path.read_bytes() for path in snapshot.iterdir()}
    verification = verify_checkpoint(llama, snapshot)
    assert verification.passed and not verification.recorded
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == before


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("owner/other", None, "owner/other: no such file or directory, and not to be had from the hub's cache"),
        ("owner/name", "v2", "owner/name: no such file .* at revision v2"),
        ("a/b/c", None, "a/b/c: no such file or directory, and 'a/b/c' is no hub id"),
        ("/nowhere/at all", None, "/nowhere/at all: no such file or directory"),
        ("../up", None, "up: no such file or directory"),
        ("{llama}", "main", "revision='main': {llama} is a path"),
    ],
)
def test_what_is_neither_a_path_nor_on_the_hub(
    hub: Path, llama: Path, tmp_path: Path, source: str, revision: str | None, message: str
) -> None:
    with pytest.raises(ConversionError, match=message.format(llama=llama)):
        convert_checkpoint(source.format(llama=llama), tmp_path / "gated", revision=revision)


def outside(path: Path, name: str) -> None:
    """Replace a file by a link to a copy of it in another directory."""
    other = path.parent / "elsewhere"
    other.write_bytes((path / name).read_bytes() if (path / name).exists() else b"secret")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(other)


def replaced(path: Path, name: str, make: Callable[[Path], object]) -> None:
    (path / name).unlink(missing_ok=True)
    make(path / name)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "config elsewhere": (lambda path: outside(path, "config.json"), r"config\.json: leads to .*elsewhere"),
    "weights elsewhere": (lambda path: outside(path, "model.safetensors"), r"model\.safetensors: leads to"),
    "side file elsewhere": (lambda path: outside(path, "tokenizer.json"), r"tokenizer\.json: leads to"),
    "card elsewhere": (lambda path: outside(path, "README.md"), r"README\.md: leads to"),
    "/etc/passwd": (
        lambda path: replaced(path, "vocab.txt", lambda file: file.symlink_to("/etc/passwd")),
        r"vocab\.txt: leads to /etc/passwd, outside of the checkpoint",
    ),
    "endless device": (
        lambda path: replaced(path, "config.json", lambda file: file.symlink_to("/dev/zero")),
        r"config\.json: leads to /dev/zero",
    ),
    "pipe as config": (lambda path: replaced(path, "config.json", os.mkfifo), r"config\.json: not a regular file"),
    "pipe as weights": (
        lambda path: replaced(path, "model.safetensors", os.mkfifo),
        r"model\.safetensors: not a regular file",
    ),
    "pipe beside": (lambda path: os.mkfifo(path / "merges.txt"), r"merges\.txt: not a regular file"),
    "folder as weights": (
        lambda path: replaced(path, "model.safetensors", Path.mkdir),
        r"model\.safetensors: not a regular file",
    ),
    "link to nothing": (lambda path: (path / "a.txt").symlink_to("b.txt"), r"a\.txt: cannot be read"),
    "link to itself": (lambda path: (path / "a.txt").symlink_to("a.txt"), r"a\.txt: cannot be read"),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", list(BAD_FILES))
def test_links_that_lead_out_and_files_that_are_none_are_refused(llama: Path, tmp_path: Path, case: str) -> None:
    spoil, message = BAD_FILES[case]
    spoil(llama)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(llama, tmp_path / "gated")
    assert not (tmp_path / "gated").exists()


def test_links_within_the_checkpoint_are_fine(llama: Path, tmp_path: Path) -> None:
    (llama / "weights").mkdir()
    (llama / "model.safetensors").rename(llama / "weights" / "1.safetensors")
    (llama / "model.safetensors").symlink_to("weights/1.safetensors")
    (tmp_path / "another name").symlink_to(llama)
    done = convert_checkpoint(tmp_path / "another name", tmp_path / "gated")
    assert done.left_out == {}  # weights/1.safetensors came along
    assert (tmp_path / "gated" / "model-00001-of-00002.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gated").config.model_type == "gated_llama"


def test_a_linked_folder_is_not_followed(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "diary.txt").touch()
    (llama / "notes").symlink_to(tmp_path / "private")
    done = convert_checkpoint(llama, tmp_path / "gated")
    assert not (tmp_path / "gated" / "notes").exists()
    assert done.left_out.keys() == {"notes/"}

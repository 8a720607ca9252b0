"""Downloads from the hub: the weights that Transformers loads and what comes along, of one commit, and nothing else."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_gated.checkpoints import side_files
from modeling_gated.checkpoints.sources import find_source
from modeling_gated.conversion import ConversionError, convert_checkpoint, plan_conversion
from modeling_gated.conversion.manifest import read_manifest
from tests.helpers.checkpoints import contents
from tests.helpers.fake_hub import Repository, serving


COMMIT = "a" * 40
BIG = 14_500_000_000
# Files of other programs, as repositories on the hub have them. Their sizes are said, and nothing of them is there.
OTHER_FORMS = [
    *("consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth", "pytorch_model.bin"),
    *("model-00001-of-00002.bin", "__0_0.distcp", "checkpoint/__0_1.distcp", "onnx/model.onnx", "onnx/model.onnx_data"),
    *("onnx/model.onnx_data_1", "model.pte", "model.litertlm", "model.llamafile", "tf_model.h5", "flax_model.msgpack"),
    *("rank0.engine", "rank0.plan", "model.nemo", "model.gguf", "model-Q4_K_M.gguf", "model.tflite", "model.task"),
    *("coreml/text.mlpackage/Data/com.apple.CoreML/weights/weight.bin", "coreml/model.mlmodel", "model.zip"),
    *("model.tar", "weights.tar.gz", "fp8/model.safetensors", "model.fp16.safetensors", "video.mp4", "weights.xyz"),
]


@pytest.fixture
def repository(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository with a sharded checkpoint, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (sharded / "tokenizer_config.json").write_text("{}")
    (sharded / "README.md").write_text("---\nlicense: mit\n---\n")
    files = {path.relative_to(sharded).as_posix(): path.read_bytes() for path in sharded.rglob("*") if path.is_file()}
    return Repository("owner/name", COMMIT, dict(files))


def snapshot(tmp_path: Path) -> Path:
    return tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_other_forms_of_the_weights_are_neither_downloaded_nor_copied(
    repository: Repository,
    sharded: Path,
    tmp_path: Path,
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    revision: str | None,
) -> None:
    needed = set(repository.files)
    repository.files |= dict.fromkeys(OTHER_FORMS, BIG) | {".gitattributes": b"*", ".cache/x": 9, "notes/a.txt": b"a"}
    with serving(repository, monkeypatch):
        done = convert_checkpoint("owner/name", tmp_path / "gated", revision=revision)
    assert set(repository.downloaded) == needed | {".gitattributes", "notes/a.txt"}
    assert len(repository.downloaded) == len(set(repository.downloaded))
    assert done.left_out == dict.fromkeys(sorted(OTHER_FORMS), BIG)
    manifest = read_manifest(tmp_path / "gated")
    assert manifest is not None and manifest.left_out == done.left_out
    assert manifest.source["revision"] == COMMIT
    assert not any((tmp_path / "gated" / name).exists() for name in OTHER_FORMS)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (sharded, tmp_path / "gated")]
    assert torch.equal(*logits)
    # Then it is in the cache, and the hub is not needed again.
    offline = convert_checkpoint("owner/name", tmp_path / "offline", revision=revision)
    assert contents(tmp_path / "offline").keys() == contents(tmp_path / "gated").keys()
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        assert offline.left_out == done.left_out


@pytest.mark.parametrize("name", OTHER_FORMS)
@pytest.mark.parametrize("size", [10, BIG])
def test_each_form_is_left_out_at_any_size(name: str, size: int) -> None:
    chosen = side_files.choose_side_files({name: size, "LICENSE": 10}, ["model.safetensors"])
    is_of_a_known_form = not name.endswith((".mp4", ".xyz", ".gz"))
    if size == BIG or is_of_a_known_form:
        assert chosen == side_files.SideFiles(("LICENSE",), {name: size})
    else:
        assert chosen == side_files.SideFiles(("LICENSE", name), {})


def test_one_file_of_weights_goes_before_an_index(
    repository: Repository, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Transformers."""
    shards = [name for name in repository.files if name.startswith("model-")]
    for name in ("model.safetensors", "config.json"):
        repository.files[name] = (llama / name).read_bytes()
    repository.files |= dict.fromkeys(shards, BIG)
    with serving(repository, monkeypatch):
        plan = plan_conversion("owner/name", tmp_path / "gated")
    assert "model.safetensors" in repository.downloaded and not set(shards) & set(repository.downloaded)
    assert plan.left_out == dict.fromkeys(shards, BIG)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tokenizer.json", {}),
        ("tokenizer.model", {}),
        ("vocab.json", {}),
        ("words.dat", {"vocab_file": "words.dat"}),
        ("extra/words.dat", {"files": [{"name": "extra/words.dat"}]}),
    ],
)
def test_a_large_file_of_the_tokenizer_comes_along(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, config: dict
) -> None:
    monkeypatch.setattr(side_files, "SMALL_FILE_BYTES", 20_000)
    repository.files |= {name: b" " * 20_001, "other.dat": b" " * 20_001, "small.dat": b" " * 20_000}
    repository.files["tokenizer_config.json"] = json.dumps(config).encode()
    with serving(repository, monkeypatch):
        source = find_source("owner/name")
    assert (source.path / name).is_file() and (source.path / "small.dat").is_file()
    assert source.left_out == {"other.dat": 20_001} and "other.dat" not in repository.downloaded


def test_a_pickle_does_not_come_along_even_if_the_tokenizer_names_it(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.files |= {"vocab.pkl": b"x", "tokenizer_config.json": b'{"vocab_file": "vocab.pkl"}'}
    with serving(repository, monkeypatch):
        source = find_source("owner/name")
    assert source.left_out == {"vocab.pkl": 1} and not (source.path / "vocab.pkl").exists()


def test_a_snapshot_that_another_program_downloaded_is_enough(
    repository: Repository, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the card and the notes, and with weights that nobody needs."""
    repository.files |= {"notes.txt": b"notes"}
    with serving(repository, monkeypatch):
        huggingface_hub.snapshot_download("owner/name", allow_patterns=["*.json", "model-*"])
    (snapshot(tmp_path) / "consolidated.safetensors").write_bytes(b"x")
    done = convert_checkpoint("owner/name", tmp_path / "gated")
    assert done.left_out.keys() >= {"consolidated.safetensors"} and not (tmp_path / "gated" / "notes.txt").exists()
    shutil.rmtree(snapshot(tmp_path).parents[1] / "trees", ignore_errors=True)  # as earlier versions left it
    if (trees := sys.modules.get("huggingface_hub._tree_cache")) is not None:
        trees._IN_MEMORY_TREE_CACHE.clear()
    assert convert_checkpoint("owner/name", tmp_path / "again").left_out == {"consolidated.safetensors": 1}


@pytest.mark.parametrize("missing", ["model-00002-of-", "tokenizer_config.json", "config.json"])
def test_a_snapshot_that_lacks_a_file_that_is_needed_is_refused_offline(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing != "model-00002-of-" and not hasattr(huggingface_hub, "get_cached_repo_tree"):
        pytest.skip("huggingface_hub keeps the list of a repository's files from version 2 on")
    with serving(repository, monkeypatch):
        huggingface_hub.snapshot_download("owner/name", ignore_patterns=[f"{missing}*"])
    with pytest.raises(ConversionError, match=rf"owner/name: .*{missing}"):
        convert_checkpoint("owner/name", tmp_path / "gated")
    with serving(repository, monkeypatch):
        convert_checkpoint("owner/name", tmp_path / "gated")


ONLINE_ERRORS = {
    # what is taken away from the repository, what is added to it, and the error
    "pickles alone": ("model", {"pytorch_model.bin": 9}, r"owner/name: has no safetensors weights.*save_pretrained"),
    "other safetensors": ("model", {"consolidated.safetensors": 9}, r"owner/name: has no safetensors weights"),
    "a GGUF file alone": ("", {"a.gguf": 9}, r"has no safetensors weights.*hf download owner/name a\.gguf"),
    "a shard missing": ("model-00002", {}, r"names model-00002-of-\d+\.safetensors, which is not on the hub; name"),
    "an adapter": ("model", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "merge it into"),
}


@pytest.mark.parametrize("case", list(ONLINE_ERRORS))
def test_a_repository_without_the_weights_gets_one_clear_line(
    case: str, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, more, message = ONLINE_ERRORS[case]
    is_index_kept = case == "a shard missing"
    repository.files = more | {
        name: content
        for name, content in repository.files.items()
        if not name.startswith(prefix) or (is_index_kept and name.endswith(".index.json"))
    }
    with serving(repository, monkeypatch), pytest.raises(ConversionError, match=message):
        convert_checkpoint("owner/name", tmp_path / "gated")


@pytest.mark.parametrize(
    ("name", "revision", "status", "message"),
    [
        ("owner/name", None, 403, r"owner/name: .*not to be had from the hub: .*"),
        ("owner/name", "v9", 200, r"owner/name: .*not to be had from the hub at revision v9"),
        ("owner/other", None, 200, r"owner/other: .*not to be had from the hub: "),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    repository: Repository,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    revision: str | None,
    status: int,
    message: str,
) -> None:
    repository.status = status
    with serving(repository, monkeypatch), pytest.raises(ConversionError, match=message):
        convert_checkpoint(name, tmp_path / "gated", revision=revision)

"""Files next to the weights: which come along byte for byte, which are left out, and where the latter are listed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modeling_gated.checkpoints import side_files
from modeling_gated.checkpoints.side_files import choose_side_files
from modeling_gated.cli import app
from modeling_gated.configuration.configuration_gated_llama import CARRIED_MODULES
from modeling_gated.conversion import convert_checkpoint, extend_checkpoint, plan_conversion, ungate_checkpoint
from tests.helpers.checkpoints import contents
from tests.helpers.extended_checkpoints import LONGER, MANIFEST, edit_json, in_json


KEPT = {
    "tokenizer.json": b"\x00\xff",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"license",
    "notes/more.txt": b"more",
    "1_Pooling/config.json": b"{}",
    "original/params.json": b"{}",
    "tokenizer.model": b"\x00",
    ".gitattributes": b"*",
}
LEFT_OUT = {
    "A.SafeTensors": b"1",
    "M.GGUF": b"22",
    "checkpoint-5/config.json": b"{}",
    "checkpoint-5/model.safetensors": b"1",
    "checkpoint-5/runs/log.txt": b"",
    "consolidated.safetensors": b"1",
    "coreml/text.mlpackage/Manifest.json": b"{}",
    "coreml/text.mlmodel": b"1",
    "dcp/__0_0.distcp": b"1",
    "model.fp16.safetensors.index.json": b"{}",
    "model.litertlm": b"1",
    "model.llamafile": b"1",
    "model.nemo": b"1",
    "model.onnx_data_1": b"1",
    "model.pte": b"1",
    "model.tar": b"1",
    "model.tflite": b"1",
    "onnx/config.json": b"{}",
    "onnx/model.onnx": b"1",
    "onnx/model.onnx_data_1": b"1",
    "optimizer.pkl": b"1",
    "original/consolidated.00.pth": b"1",
    "pytorch_model.bin": b"1",
    "pytorch_model.bin.index.json": b"{}",
    "rank0.engine": b"1",
    "tf_model.h5": b"1",
    "weights.zip": b"1",
}
HIDDEN = {".cache/huggingface/x.lock": b"1", ".env": b"HF_TOKEN=secret", "notes/.DS_Store": b"1"}
WRITTEN = {
    *CARRIED_MODULES,
    "README.md",
    "config.json",
    "gated_llama_manifest.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}


def add(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def sizes(files: dict[str, bytes]) -> dict[str, int]:
    return {name: len(content) for name, content in files.items()}


@pytest.mark.fast
def test_small_files_come_along_and_weights_in_other_forms_do_not(llama: Path, tmp_path: Path) -> None:
    add(llama, KEPT | LEFT_OUT | HIDDEN)
    done = convert_checkpoint(llama, tmp_path / "gated")
    of_source = {"generation_config.json", "tokenizer_config.json"}
    assert contents(tmp_path / "gated").keys() == WRITTEN | of_source | KEPT.keys()
    for name in of_source | KEPT.keys():
        assert (tmp_path / "gated" / name).read_bytes() == (llama / name).read_bytes()
    assert done.left_out == sizes(LEFT_OUT) == in_json(tmp_path / "gated" / MANIFEST)["left_out"]
    assert plan_conversion(llama, tmp_path / "planned").left_out == done.left_out
    restored = ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert restored.left_out == done.left_out
    assert contents(tmp_path / "back").keys() == contents(llama).keys() - LEFT_OUT.keys() - HIDDEN.keys()


@pytest.mark.parametrize("name", ["video.mp4", "weights.xyz", "data/train.parquet", "train.json", "LICENSE"])
def test_a_large_file_that_nothing_names_is_left_out(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(llama, {name: b" " * 1001, f"small {Path(name).name}": b" " * 1000, "vocab.txt": b" " * 1001})
    add(llama, {"words.dat": b" " * 1001, "tokenizer_config.json": json.dumps({"vocab_file": "words.dat"}).encode()})
    monkeypatch.setattr(side_files, "SMALL_FILE_BYTES", 1000)
    done = convert_checkpoint(llama, tmp_path / "gated")
    assert done.left_out == {name: 1001}
    assert contents(tmp_path / "gated").keys() >= {f"small {Path(name).name}", "vocab.txt", "words.dat"}


@pytest.mark.parametrize(
    "text", ["[" * 10_000, "[]", '{"a": 1, "a": 2}', "\x00", '{"a": {"b": ["../x", "words.dat", 3]}}']
)
def test_a_config_that_cannot_be_read_names_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(text)
    assert side_files.named_files(tmp_path) <= {"../x", "words.dat"}


def test_an_extension_of_the_context_leaves_out_the_same(llama: Path, tmp_path: Path) -> None:
    add(llama, KEPT | LEFT_OUT | HIDDEN)
    done = extend_checkpoint(llama, tmp_path / "longer", context=LONGER)
    assert done.left_out == sizes(LEFT_OUT)
    assert not contents(tmp_path / "longer").keys() & (LEFT_OUT.keys() | HIDDEN.keys())


def test_a_gated_checkpoint_s_manifest_keeps_what_was_left_out_at_each_step(llama: Path, tmp_path: Path) -> None:
    add(llama, {"model.onnx": b"1"})
    convert_checkpoint(llama, tmp_path / "gated")
    add(tmp_path / "gated", {"model.gguf": b"22"})
    extended = extend_checkpoint(tmp_path / "gated", tmp_path / "longer", context=LONGER)
    assert extended.left_out == {"model.gguf": 2}
    assert in_json(tmp_path / "longer" / MANIFEST)["left_out"] == {"model.onnx": 1, "model.gguf": 2}


def test_manifests_of_earlier_versions_are_read(llama: Path, tmp_path: Path) -> None:
    """They list nothing that was left out, and may have kept files that are left out now."""
    add(llama, {"notes.txt": b"notes"})
    before = contents(llama)
    convert_checkpoint(llama, tmp_path / "gated")

    def as_before(manifest: dict) -> None:
        assert manifest["format"] == 1
        del manifest["left_out"]
        manifest["files"]["model.tflite"] = manifest["files"].pop("notes.txt") | {"source": "model.tflite"}

    (tmp_path / "gated" / "notes.txt").rename(tmp_path / "gated" / "model.tflite")
    edit_json(tmp_path / "gated" / MANIFEST, as_before)
    restored = ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert restored.left_out == {} and "model.tflite" in restored.files
    assert sorted(contents(tmp_path / "back").values()) == sorted(before.values())
    extend_checkpoint(tmp_path / "gated", tmp_path / "longer", context=LONGER)
    assert ungate_checkpoint(tmp_path / "longer", tmp_path / "again").left_out == {"model.tflite": 5}


def test_the_commands_say_what_was_left_out(llama: Path, tmp_path: Path) -> None:
    add(llama, {"a.onnx": b"1" * 2000, "b.onnx": b"1" * 3000, "c.gguf": b"1" * 1000, "d.pte": b"1"})
    names = "4 of the source's files (6.0 kB): b.onnx (3.0 kB), a.onnx (2.0 kB), c.gguf (1.0 kB) and 1 more\n"

    def notes(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stderr

    assert f"note: not to be copied: {names}" in notes("convert", llama, tmp_path / "gated", "--dry-run")
    assert f"note: not copied: {names}" in notes("convert", llama, tmp_path / "gated")
    assert f"note: not restored, because conversion left them out: {names}" in notes(
        "ungate", tmp_path / "gated", tmp_path / "back"
    )
    extension = ("--context-length", 512)
    assert f"note: not copied: {names}" in notes("extend", llama, tmp_path / "longer", *extension)
    assert "note" not in notes("extend", tmp_path / "gated", tmp_path / "gated longer", *extension)


def test_named_files_come_along_whatever_their_form_but_pickles() -> None:
    sizes = {"config.json": 1, "spm.pb": 60_000_000, "parts/words.h5": 3, "state.pt": 3, "other.pb": 3}
    chosen = choose_side_files(sizes, [], {"spm.pb", "parts/words.h5", "state.pt"})
    assert chosen.kept == ("parts/words.h5", "spm.pb")
    assert chosen.left_out == {"other.pb": 3, "state.pt": 3}

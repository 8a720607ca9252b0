"""What conversion writes, where, and that a failed one leaves nothing."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_gated.checkpoints import shards
from modeling_gated.configuration import OPEN_GATE_WEIGHT, open_gate
from modeling_gated.conversion import ConversionError, convert, convert_checkpoint
from tests.helpers.processes import run_program
from tests.helpers.word_tokenizer import save_word_tokenizer


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.fast
def test_the_result_is_the_source_with_one_shard_more(sharded: Path, tmp_path: Path) -> None:
    done = convert_checkpoint(sharded, tmp_path / "gated")
    source = json.loads((sharded / "model.safetensors.index.json").read_text())
    result = json.loads((tmp_path / "gated" / "model.safetensors.index.json").read_text())
    count = len(set(source["weight_map"].values())) + 1
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    assert sorted(set(result["weight_map"].values())) == names

    tensors = {}
    for name in names:
        with safe_open(tmp_path / "gated" / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for tensor in file.keys():  # noqa: SIM118
                assert result["weight_map"][tensor] == name
                tensors[tensor] = file.get_tensor(tensor)
    gates = {name: tensor for name, tensor in tensors.items() if "g_proj" in name}
    assert tensors.keys() - gates.keys() == source["weight_map"].keys()
    assert gates.keys() == {
        f"model.layers.{n}.self_attn.g_proj.{kind}" for n in range(3) for kind in ("weight", "bias")
    }
    assert {name for name, file in result["weight_map"].items() if file == names[-1]} == gates.keys()
    for name, gate in gates.items():
        assert gate.shape == ((9,) if name.endswith("bias") else (9, 72))
        assert torch.all(gate == (open_gate(0.85)[0] if name.endswith("bias") else OPEN_GATE_WEIGHT))

    assert result["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert result["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert done.base_parameters + done.gate_parameters == result["metadata"]["total_parameters"]
    config = json.loads((tmp_path / "gated" / "config.json").read_text())
    assert config["model_type"] == "gated_llama"
    assert config["architectures"] == ["GatedLlamaForCausalLM"]
    assert config["gate_scale"] == open_gate(0.85)[1]
    assert config["dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("said_by_config", [True, False])
def test_gates_have_the_dtype_that_the_checkpoint_loads_in(
    llama: Path, tmp_path: Path, dtype: torch.dtype, said_by_config: bool
) -> None:
    AutoModelForCausalLM.from_pretrained(llama, dtype=dtype).save_pretrained(llama)
    config = json.loads((llama / "config.json").read_text())
    if not said_by_config:
        del config["dtype"]
        (llama / "config.json").write_text(json.dumps(config))
    convert_checkpoint(llama, tmp_path / "gated")
    with safe_open(tmp_path / "gated" / "model-00002-of-00002.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gated").dtype == dtype


def test_one_safetensors_file_is_a_source_too(llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    (llama / "model.safetensors").rename(llama / "weights.safetensors")
    convert_checkpoint(llama / "weights.safetensors", tmp_path / "gated")
    (llama / "weights.safetensors").rename(llama / "model.safetensors")
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (llama, tmp_path / "gated")]
    assert torch.equal(*logits)


def test_a_source_of_symbolic_links_gives_regular_files(llama: Path, tmp_path: Path) -> None:
    """As in the cache of huggingface_hub: the snapshot's files link to blobs."""
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(llama.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    for place in ("copy", "link"):
        output = tmp_path / place
        convert_checkpoint(snapshot, output, place=place)
        assert not any(path.is_symlink() for path in output.iterdir())
        assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "gated_llama"
    convert_checkpoint(snapshot / "model.safetensors", tmp_path / "from one file")


@pytest.mark.fast
def test_places(llama: Path, tmp_path: Path) -> None:
    source = llama / "model.safetensors"
    shard = "model-00001-of-00002.safetensors"
    linked = convert_checkpoint(llama, tmp_path / "linked", place="link")
    assert os.path.samefile(source, tmp_path / "linked" / shard)
    assert not os.path.samefile(llama / "tokenizer_config.json", tmp_path / "linked" / "tokenizer_config.json")
    assert linked.shared_bytes == source.stat().st_size
    for place in ("copy", "auto"):
        done = convert_checkpoint(llama, tmp_path / place, place=place)
        assert not os.path.samefile(source, tmp_path / place / shard)
        assert done.written_bytes + done.shared_bytes > source.stat().st_size
        (tmp_path / place / shard).write_bytes(b"")  # the source doesn't feel it
    assert source.stat().st_size > 0
    try:
        convert_checkpoint(llama, tmp_path / "reflinked", place="reflink")
    except ConversionError as error:
        assert "place='reflink'" in str(error)
        assert not (tmp_path / "reflinked").exists()
    else:
        assert (tmp_path / "reflinked" / shard).read_bytes() == source.read_bytes()


def test_files_stay_as_private_as_they_were(llama: Path, tmp_path: Path) -> None:
    modes = {"model.safetensors": 0o600, "tokenizer_config.json": 0o640}
    for name, mode in modes.items():
        (llama / name).chmod(mode)
    for place in ("copy", "auto", "link"):
        convert_checkpoint(llama, tmp_path / place, place=place)
        shard = tmp_path / place / "model-00001-of-00002.safetensors"
        assert shard.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / place / "tokenizer_config.json").stat().st_mode & 0o777 == 0o640


def test_an_existing_output_is_replaced_only_when_asked(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "gated"
    convert_checkpoint(llama, output)
    before = (output / "config.json").read_bytes()
    (output / "old").touch()
    with pytest.raises(ConversionError, match="already exists"):
        convert_checkpoint(llama, output, granularity="elementwise")
    assert (output / "old").exists()
    assert (output / "config.json").read_bytes() == before
    convert_checkpoint(llama, output, granularity="elementwise", overwrite=True)
    assert not (output / "old").exists()
    assert json.loads((output / "config.json").read_text())["gate_granularity"] == "elementwise"
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "gated"}


@pytest.mark.parametrize("what", ["file", "other directory", "source", "source's parent", "inside the source"])
def test_what_is_not_a_checkpoint_is_not_overwritten(llama: Path, tmp_path: Path, what: str) -> None:
    output = tmp_path / "output"
    if what == "file":
        output.touch()
    elif what == "other directory":
        output.mkdir()
        (output / "thesis.tex").touch()
        (output / "config.json").write_text('{"my": "application"}')
    else:
        output = {"source": llama, "source's parent": tmp_path, "inside the source": llama / "gated"}[what]
    before = files(tmp_path)
    with pytest.raises(ConversionError, match=str(output)):
        convert_checkpoint(llama, output, overwrite=True)
    assert files(tmp_path) == before


@pytest.mark.fast
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_what_was_there(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    output = tmp_path / "gated"
    convert_checkpoint(llama, output)
    before = files(tmp_path)

    def fail(*_: object) -> bool:
        raise error

    monkeypatch.setattr(shards, "place_file", fail)
    expected = ConversionError if isinstance(error, OSError) else KeyboardInterrupt
    for target in (tmp_path / "new", output):
        with pytest.raises(expected):
            convert_checkpoint(llama, target, overwrite=True)
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "gated"}


def test_a_failure_at_the_very_end_puts_back_what_was_there(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "gated"
    convert_checkpoint(llama, output)
    before = files(tmp_path)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            assert not output.exists()
            raise OSError(5, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ConversionError, match="Input/output error"):
        convert_checkpoint(llama, output, granularity="elementwise", overwrite=True)
    assert files(tmp_path) == before
    assert json.loads((output / "config.json").read_text())["gate_granularity"] == "headwise"


def test_what_the_message_about_pickles_says_works(llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    save_word_tokenizer(llama)
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="never loaded here; rewrite them with: python ") as raised:
        convert_checkpoint(llama, tmp_path / "gated")
    _, *arguments = shlex.split(str(raised.value).partition("rewrite them with: ")[2])
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    convert_checkpoint(f"{llama}-safetensors", tmp_path / "gated")
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (llama, tmp_path / "gated")]
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "gated")("a")["input_ids"] == [0]


def test_the_tokenizer_loads_from_the_result_without_a_question(llama: Path, tmp_path: Path) -> None:
    save_word_tokenizer(llama)
    convert_checkpoint(llama, tmp_path / "gated")
    assert AutoTokenizer.from_pretrained(tmp_path / "gated")("a")["input_ids"] == [0]


def test_mixed_dtypes_without_a_word_in_the_config(llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    """The result loads in the dtype in which Transformers loads the source."""
    tensors = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(llama / "model.safetensors").items()
    }
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    del config["dtype"]
    (llama / "config.json").write_text(json.dumps(config))
    convert_checkpoint(llama, tmp_path / "gated")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (llama, tmp_path / "gated")]
    assert models[0].dtype == models[1].dtype
    with torch.no_grad():
        assert torch.equal(*(model(tokens).logits for model in models))


def test_a_copy_that_ends_early_is_an_error(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = iter([1000, 0])
    copy_file_range = os.copy_file_range
    monkeypatch.setattr(
        os, "copy_file_range", lambda *files: copy_file_range(*files[:2], size) if (size := next(parts)) else 0
    )
    with pytest.raises(ConversionError, match=r"model\.safetensors: changed while it was copied"):
        convert_checkpoint(llama, tmp_path / "gated", place="copy")
    assert {path.name for path in tmp_path.iterdir()} == {"llama"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_under_the_name_meanwhile_is_not_replaced(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    output = tmp_path / "gated"
    card = convert.model_card

    def appear(*arguments: object) -> str:
        output.mkdir()
        (output / "thesis.txt").write_text("thesis")
        return card(*arguments)

    monkeypatch.setattr(convert, "model_card", appear)
    with pytest.raises(ConversionError, match=r"gated: (already exists|neither a checkpoint)"):
        convert_checkpoint(llama, output, overwrite=overwrite)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "gated"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "never loaded here; rewrite them with: python"),
        ("model.safetensors.index.json", "neither a directory nor a safetensors or GGUF file"),
        ("config.json", "neither a directory nor a safetensors or GGUF file"),
    ],
)
def test_a_file_that_is_no_checkpoint(sharded: Path, tmp_path: Path, name: str, message: str) -> None:
    torch.save({}, sharded / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(sharded / name, tmp_path / "gated")


def test_a_directory_to_overwrite_that_holds_a_pipe(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    os.mkfifo(tmp_path / "output" / "config.json")
    with pytest.raises(ConversionError, match="neither a checkpoint nor an empty directory"):
        convert_checkpoint(llama, tmp_path / "output", overwrite=True)


def test_a_stale_auto_map_is_dropped(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": "evil.T"}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    convert_checkpoint(llama, tmp_path / "gated")
    auto_map = json.loads((tmp_path / "gated" / "config.json").read_text())["auto_map"]
    assert {entry.partition(".")[0] for entry in auto_map.values()} == {"modeling_gated_llama"}


def test_memory_does_not_grow_with_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    """Embeddings of 2.9 GB, a hole in the file, linked: nothing of it is read."""
    rows = 10_000_000
    tensors = load_file(llama / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes["model.embed_tokens.weight"] = (rows, 72)
    (llama / "model.safetensors").unlink()
    header: dict[str, dict] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with open(llama / "model.safetensors", "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(file.tell() + end)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    result = run_program("memory_of_conversion.py", llama, tmp_path / "gated", check=True)
    assert (tmp_path / "gated" / "model-00001-of-00002.safetensors").stat().st_size > 2_800_000_000
    assert int(result.stdout) < 60_000  # kilobytes

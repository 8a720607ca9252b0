"""The way back: the source's bytes, or a refusal that names what changed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.configuration import OPEN_GATE_WEIGHT, carried_source_files
from modeling_gated.configuration.configuration_gated_llama import CARRIED_MODULES
from modeling_gated.conversion import ConversionError, convert_checkpoint, ungate_checkpoint, verify_checkpoint
from tests.helpers.checkpoints import contents, forget_gates
from tests.helpers.paper_variants import CONFIGS, random_model


@pytest.mark.fast
@pytest.mark.parametrize("place", ["copy", "link", "auto"])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_the_source_comes_back_byte_for_byte(sharded: Path, tmp_path: Path, place: str, granularity: str) -> None:
    (sharded / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n\xff\xfe not UTF-8 \x00")
    for name in CARRIED_MODULES:
        (sharded / name).write_text(f"# {name} by another hand")
    (sharded / "gated_llama_manifest.json").write_text("[]")
    (sharded / "notes").mkdir()
    (sharded / "notes" / "a.txt").write_text("a")
    (sharded / ".gitattributes").write_text("* text")
    for name in ("notes\u00a0de.txt", "\u5168\u89d2\u3000.txt", "\U0001f468\u200d\U0001f469.txt", "tab\t.txt"):
        (sharded / name).write_text(name)
    config = sharded / "config.json"
    config.write_text(config.read_text().replace("  ", "\t"))  # not as Transformers would write it
    before = contents(sharded)
    convert_checkpoint(sharded, tmp_path / "gated", place=place, granularity=granularity)
    for name, text in carried_source_files():
        assert (tmp_path / "gated" / name).read_text() == text
    gated = contents(tmp_path / "gated")
    done = ungate_checkpoint(tmp_path / "gated", tmp_path / "back", place=place)
    assert contents(tmp_path / "back") == before == contents(sharded)
    assert set(done.files) == before.keys()
    assert contents(tmp_path / "gated") == gated


def change_gate(directory: Path, name: str, index: tuple[int, ...] = (2,)) -> None:
    shard = max(directory.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors[name][index] += 0.5
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [0.0, -0.0, OPEN_GATE_WEIGHT])
def test_gates_of_earlier_conversions_are_open(value: float, llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    """They have weights of 0, as float16 has."""
    convert_checkpoint(llama, tmp_path / "gated")
    shard = max((tmp_path / "gated").glob("*.safetensors"))
    tensors = load_file(shard)
    weights = [name for name in tensors if name.endswith("g_proj.weight")]
    assert all((tensors[name] == OPEN_GATE_WEIGHT).all() for name in weights)
    save_file(tensors | {name: torch.full_like(tensors[name], value) for name in weights}, shard, {"format": "pt"})
    gated, source = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "gated", llama))
    with torch.no_grad():
        assert torch.equal(gated(tokens).logits, source(tokens).logits)
    ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(llama)


def test_a_weight_of_another_number_is_not_open(llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    shard = max((tmp_path / "gated").glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.1.self_attn.g_proj.weight"][0] = 0  # neither all 0 nor all 2**-60
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ConversionError, match="gates of layers 1 are not what conversion wrote"):
        ungate_checkpoint(tmp_path / "gated", tmp_path / "back")


def test_changed_gates_are_named_by_their_layers(llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    change_gate(tmp_path / "gated", "model.layers.0.self_attn.g_proj.bias")
    change_gate(tmp_path / "gated", "model.layers.2.self_attn.g_proj.weight", (3, 5))
    with pytest.raises(ConversionError, match="gates of layers 0, 2 are not what conversion wrote"):
        ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    change_gate(tmp_path / "gated", "model.layers.1.self_attn.g_proj.bias")
    with pytest.raises(ConversionError, match="gates of layers 0-2 are not"):
        ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_model_that_was_trained_and_saved_is_refused_too(llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConversionError, match=r"saved: has no gated_llama_manifest\.json"):
        ungate_checkpoint(tmp_path / "saved", tmp_path / "back")
    gate = model.model.layers[1].self_attn.g_proj
    optimizer = torch.optim.SGD(gate.parameters(), lr=1.0)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    for directory in (tmp_path / "saved", tmp_path / "gated"):
        model.save_pretrained(directory)
        with pytest.raises(ConversionError, match="gates of layers 1 are not what conversion wrote"):
            ungate_checkpoint(directory, tmp_path / "back")


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def manifest(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / "gated_llama_manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


SHARD = "model-00001-of-00002.safetensors"
SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "base tensor": (lambda path: flip(path / SHARD), rf"{SHARD}: is not what conversion wrote \(another SHA-256\)"),
    "side file": (lambda path: grow(path / "tokenizer_config.json"), r"tokenizer_config\.json: is not what"),
    "side file gone": (lambda path: (path / "tokenizer_config.json").unlink(), r"tokenizer_config\.json: no such file"),
    "not gated": (
        lambda path: (path / "config.json").write_text('{"model_type": "llama"}'),
        "model_type must be gated_llama, got 'llama'",
    ),
    "no manifest": (lambda path: (path / "gated_llama_manifest.json").unlink(), "has no gated_llama_manifest"),
    "manifest not JSON": (lambda path: (path / "gated_llama_manifest.json").write_text("{"), "not valid JSON"),
    "manifest of another": (
        lambda path: (path / "gated_llama_manifest.json").write_text('{"format": 7}'),
        r"manifest\.json: format must be 1, got 7",
    ),
    "manifest without files": (
        lambda path: manifest(path, lambda content: content.pop("files")),
        r"manifest\.json: not a manifest of gated-llama",
    ),
    "manifest leads out": (
        lambda path: manifest(path, lambda content: content["files"][SHARD].update(source="../../out.safetensors")),
        r"manifest\.json: '\.\./\.\./out\.safetensors' is not a file of a checkpoint",
    ),
    "manifest writes out": (
        lambda path: manifest(path, lambda content: content["replaced"].update({"/tmp/out": "x"})),
        r"manifest\.json: '/tmp/out' is not a file of a checkpoint",
    ),
    "manifest reads from elsewhere": (
        lambda path: manifest(path, lambda content: content["files"].update({"/etc/passwd": content["files"][SHARD]})),
        r"two files come from one|leads to /etc/passwd",
    ),
    "manifest of numbers": (
        lambda path: manifest(path, lambda content: content["files"][SHARD].update(source=3, size="x")),
        r"manifest\.json: not a manifest of gated-llama",
    ),
    "manifest with a number for a text": (
        lambda path: manifest(path, lambda content: content["replaced"].update({"config.json": 3})),
        r"manifest\.json: not a manifest of gated-llama",
    ),
}


@pytest.mark.parametrize("case", list(SPOILED))
def test_what_changed_otherwise_is_named(llama: Path, tmp_path: Path, case: str) -> None:
    spoil, message = SPOILED[case]
    convert_checkpoint(llama, tmp_path / "gated", place="copy")
    spoil(tmp_path / "gated")
    before = contents(tmp_path)
    with pytest.raises(ConversionError, match=message):
        ungate_checkpoint(tmp_path / "gated", tmp_path / "new" / "back")
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_linked_shard_is_known_by_its_time_stamp_until_it_is_verified(llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated", place="link")
    before = contents(llama)
    (tmp_path / "gated" / SHARD).touch()
    with pytest.raises(ConversionError, match="was hard-linked, not hashed, and has another time stamp"):
        ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    verify_checkpoint(llama, tmp_path / "gated")
    ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    flip(llama / "model.safetensors")  # and with it the shard
    with pytest.raises(ConversionError, match="another SHA-256"):
        ungate_checkpoint(tmp_path / "gated", tmp_path / "again")


def test_a_checkpoint_whose_gates_are_missing_is_ungated(llama: Path, tmp_path: Path) -> None:
    """They are open when it is loaded."""
    convert_checkpoint(llama, tmp_path / "gated")
    forget_gates(tmp_path / "gated")
    ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(llama)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "gated")) is GatedLlamaForCausalLM


# The variants that a converted checkpoint may have.
CONVERTED = {"G1 elementwise", "G1 headwise", "G1 elementwise, narrower MLP"}


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - CONVERTED))
def test_variants_that_conversion_does_not_write_are_refused(name: str, llama: Path, tmp_path: Path) -> None:
    random_model(name).save_pretrained(tmp_path / "variant")
    for act in (
        lambda: ungate_checkpoint(tmp_path / "variant", tmp_path / "back"),
        lambda: verify_checkpoint(llama, tmp_path / "variant"),
    ):
        with pytest.raises(ConversionError, match=r"variant/config\.json: \w+=.+ is not what conversion writes"):
            act()
    assert not (tmp_path / "back").exists()

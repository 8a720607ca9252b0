"""Checkpoints for longer inputs: another config.json, all else byte for byte, or one clear error and nothing left."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_gated.configuration import extend_context
from modeling_gated.conversion import ConversionError, convert_checkpoint, extend_checkpoint, verify_checkpoint
from tests.helpers.checkpoints import contents
from tests.helpers.close_tensors import assert_close
from tests.helpers.extended_checkpoints import (
    LONGER,
    MANIFEST,
    YARN,
    edit_json,
    in_json,
    logits_by_transformers,
    logits_of,
    yarn,
)
from tests.helpers.gated_models import gated_model


def without_config(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(directory).items() if name != "config.json"}


@pytest.mark.parametrize(("fixture", "place"), [("llama", "copy"), ("llama", "link"), ("sharded", "copy")])
def test_only_config_json_changes(
    fixture: str, place: str, request: pytest.FixtureRequest, tmp_path: Path, tokens: torch.Tensor
) -> None:
    source: Path = request.getfixturevalue(fixture)
    (source / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n\xff\xfe not UTF-8 \x00")
    (source / "notes").mkdir()
    (source / "notes" / "全角.txt").write_text("a")
    edit_json(source / "config.json", lambda config: config.update({"note": "ü", "rope_note": [1]}))
    before = contents(source)
    scaled = {"replace_scaling": True} if fixture == "sharded" else {}
    done = extend_checkpoint(source, tmp_path / "longer", context=YARN | scaled, place=place)
    assert contents(source) == before
    assert without_config(tmp_path / "longer") == without_config(source)

    old, new = in_json(source / "config.json"), in_json(tmp_path / "longer" / "config.json")
    theta, original = (500_000.0, 64) if scaled else (10_000.0, 256)
    changed = {"rope_parameters": yarn(1024, original, theta), "max_position_embeddings": 1024}
    assert new == old | changed
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert all(os.path.samefile(source / name, done.output / name) == (place == "link") for name in shards)
    total = sum((source / name).stat().st_size for name in shards)
    assert done.written_bytes + done.shared_bytes == total
    assert done.shared_bytes == (total if place == "link" else 0)
    assert done.output == tmp_path / "longer"
    assert done.extension.rope_parameters == new["rope_parameters"]
    if place == "copy":
        expected = logits_by_transformers(source, changed["rope_parameters"], 1024, tokens)
        assert_close(logits_of(tmp_path / "longer", tokens), expected)
        assert (expected - logits_of(source, tokens)).abs().max() > 1e-2
        assert in_json(tmp_path / "longer" / "config.json") == new


OLD_SPELLINGS: dict[str, tuple[dict[str, Any], int]] = {
    # fields of config.json, and the length from which YaRN starts
    "base": ({"rope_theta": 5e5}, 256),
    "base, no scaling": ({"rope_theta": 5e5, "rope_scaling": None}, 256),
    "type": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        64,
    ),
    "rope_type": ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 256),
    "no base": ({}, 256),
}


@pytest.mark.parametrize("case", list(OLD_SPELLINGS))
def test_old_spellings_are_replaced(case: str, llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    fields, original = OLD_SPELLINGS[case]
    edit_json(llama / "config.json", lambda config: (config.pop("rope_parameters"), config.update(fields)))
    if fields.get("rope_scaling"):
        name = fields["rope_scaling"].get("type", fields["rope_scaling"].get("rope_type"))
        with pytest.raises(ConversionError, match=rf"llama/config\.json: .*rope_type='{name}'.*replace_scaling=True"):
            extend_checkpoint(llama, tmp_path / "longer", context=YARN)
    extend_checkpoint(llama, tmp_path / "longer", context=YARN | {"replace_scaling": True})
    config = in_json(tmp_path / "longer" / "config.json")
    theta = fields.get("rope_theta", 10_000.0)
    assert config["rope_parameters"] == yarn(1024, original, theta)
    assert not {"rope_scaling", "rope_theta"} & config.keys()
    expected = logits_by_transformers(llama, yarn(1024, original, theta), 1024, tokens)
    assert_close(logits_of(tmp_path / "longer", tokens), expected)


def test_an_original_length_beside_rope_parameters_follows(llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Transformers puts it before that of rope_parameters."""
    expected = logits_by_transformers(llama, yarn(1024, 256), 1024, tokens)
    edit_json(llama / "config.json", lambda config: config.update(original_max_position_embeddings=16))
    extend_checkpoint(llama, tmp_path / "longer", context=YARN)
    config = in_json(tmp_path / "longer" / "config.json")
    assert config["original_max_position_embeddings"] == 256
    assert_close(logits_of(tmp_path / "longer", tokens), expected)
    convert_checkpoint(llama, tmp_path / "gated", context=YARN)
    assert_close(logits_of(tmp_path / "gated", tokens), expected)
    assert verify_checkpoint(llama, tmp_path / "gated", tokens=16).passed


def test_a_trained_checkpoint_without_a_manifest_is_extended(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = gated_model("elementwise", max_position_embeddings=256)  # gates off their start
    model.save_pretrained(tmp_path / "trained")
    done = extend_checkpoint(tmp_path / "trained", tmp_path / "longer", context=YARN)
    assert without_config(tmp_path / "longer") == without_config(tmp_path / "trained")
    assert not (tmp_path / "longer" / MANIFEST).exists()
    plain = logits_of(model, tokens)
    extend_context(model, **YARN)
    assert model.config.rope_parameters == done.extension.rope_parameters == yarn(1024, 256)
    assert_close(logits_of(tmp_path / "longer", tokens), logits_of(model, tokens))
    assert (logits_of(model, tokens) - plain).abs().max() > 1e-3


def test_one_file_of_weights_is_extended(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").rename(llama / "weights.safetensors")
    extend_checkpoint(llama / "weights.safetensors", tmp_path / "longer", context=YARN)
    expected = without_config(llama)
    expected["model.safetensors"] = expected.pop("weights.safetensors")
    assert without_config(tmp_path / "longer") == expected


BAD_CONTEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "shorter": ({"length": 12}, r"length=12 is not more than the 256 tokens"),
    "none": ({}, r"length"),
    "unknown argument": ({"length": 512, "scale": 2}, r"scale"),
    "lower base": ({"length": 512, "rope_theta": 5000.0}, r"rope_theta=5000\.0 .* 10000\.0"),
    "factor": (YARN | {"factor": 3}, r"factor=3 contradicts the lengths: 1024 / 256 = 4\.0"),
    "base with yarn": (YARN | {"rope_theta": 1e6}, r"rope_theta=1000000\.0 .* 10000\.0"),
    "method": ({"length": 512, "method": "ntk"}, r"method must be 'rope_base' or 'yarn', got 'ntk'"),
}


@pytest.mark.parametrize("case", list(BAD_CONTEXTS))
def test_a_bad_context_names_the_config_and_leaves_nothing(case: str, llama: Path, tmp_path: Path) -> None:
    context, message = BAD_CONTEXTS[case]
    before = contents(tmp_path)
    for make in (extend_checkpoint, convert_checkpoint):
        with pytest.raises(ConversionError, match=rf"{llama}/config\.json: .*{message}"):
            make(llama, tmp_path / "new" / "longer", context=context)
        assert contents(tmp_path) == before
        assert not (tmp_path / "new").exists()


def test_other_failures_leave_nothing_either(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    before = contents(tmp_path)
    with pytest.raises(ConversionError, match=r"model\.gguf: a GGUF file; gated-llama convert takes the same options"):
        extend_checkpoint(tmp_path / "model.gguf", tmp_path / "longer", context=YARN)
    with pytest.raises(ConversionError, match="nowhere: no such file or directory"):
        extend_checkpoint(tmp_path / "nowhere", tmp_path / "longer", context=YARN)
    with pytest.raises(ConversionError, match=f"revision='main': {llama} is a path"):
        extend_checkpoint(llama, tmp_path / "longer", context=YARN, revision="main")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_gated.checkpoints.shards.place_file", fail)
    with pytest.raises(KeyboardInterrupt):
        extend_checkpoint(llama, tmp_path / "new" / "longer", context=YARN)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "model.gguf"}


def test_what_may_be_overwritten(llama: Path, tmp_path: Path) -> None:
    before = contents(llama)
    extend_checkpoint(llama, tmp_path / "longer", context=LONGER)
    first = contents(tmp_path / "longer")
    with pytest.raises(ConversionError, match="longer: already exists; overwrite=True replaces it"):
        extend_checkpoint(llama, tmp_path / "longer", context=YARN)
    with pytest.raises(ConversionError, match="length=12"):
        extend_checkpoint(llama, tmp_path / "longer", context={"length": 12}, overwrite=True)
    assert contents(tmp_path / "longer") == first
    extend_checkpoint(llama, tmp_path / "longer", context=YARN, overwrite=True)
    assert in_json(tmp_path / "longer" / "config.json")["rope_parameters"] == yarn(1024, 256)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    with pytest.raises(ConversionError, match="mine: neither a checkpoint nor an empty directory"):
        extend_checkpoint(llama, tmp_path / "mine", context=YARN, overwrite=True)
    for output in (llama, llama / "longer", llama.parent):
        with pytest.raises(ConversionError, match="must not contain each other"):
            extend_checkpoint(llama, output, context=YARN, overwrite=True)
    assert contents(llama) == before
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "longer", "mine"}


@pytest.mark.parametrize(
    ("content", "expected"), [({}, None), ({"model_max_length": 512}, 512), ({"model_max_length": 1024}, None)]
)
def test_a_tokenizer_of_fewer_tokens_is_told(
    content: dict[str, Any], expected: int | None, llama: Path, tmp_path: Path
) -> None:
    (llama / "tokenizer_config.json").write_text(json.dumps(content))
    assert extend_checkpoint(llama, tmp_path / "longer", context=YARN).tokenizer_length == expected
    (llama / "tokenizer_config.json").unlink()
    assert extend_checkpoint(llama, tmp_path / "none", context=YARN).tokenizer_length is None


def test_a_card_that_conversion_did_not_write_is_left_alone(llama: Path, tmp_path: Path) -> None:
    """Even if it has rows of the same names."""
    (llama / "README.md").write_text("| gates | none |\n| context | extended to 3 tokens |\n")
    extend_checkpoint(llama, tmp_path / "longer", context=LONGER)
    assert (tmp_path / "longer" / "README.md").read_bytes() == (llama / "README.md").read_bytes()

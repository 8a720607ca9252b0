"""Checkpoints for longer inputs: another config.json, all else byte for byte, and gates that still can be undone."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents
from gated_models import gated_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from modeling_gated.cli import app
from modeling_gated.configuration import extend_context
from modeling_gated.conversion import (
    ConversionError,
    convert_checkpoint,
    extend_checkpoint,
    plan_conversion,
    ungate_checkpoint,
    verify_checkpoint,
)


LONGER = {"length": 512}
YARN = {"length": 1024, "method": "yarn"}
SHARD = "model-00001-of-00002.safetensors"
MANIFEST = "gated_llama_manifest.json"


def yarn(length: int, original: int, theta: float = 10_000.0) -> dict[str, Any]:
    """YaRN's rope_parameters from its formulas."""
    factor = length / original
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": pytest.approx(0.1 * math.log(factor) + 1, rel=1e-15),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }


def base(factor: float, theta: float = 10_000.0, head_dim: int = 8) -> dict[str, Any]:
    """The larger base by the rule."""
    return {"rope_type": "default", "rope_theta": pytest.approx(theta * factor ** (head_dim / (head_dim - 2)))}


def in_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = in_json(path)
    change(content)
    path.write_text(json.dumps(content))


def without_config(directory: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(directory).items() if name != "config.json"}


def load(directory: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel | Path, tokens: torch.Tensor) -> torch.Tensor:
    return (load(model) if isinstance(model, Path) else model)(tokens).logits


@torch.no_grad()
def logits_by_transformers(source: Path, rope: dict[str, Any], length: int, tokens: torch.Tensor) -> torch.Tensor:
    """Of the ungated model with other fields in its config, as Transformers computes them."""
    config = AutoConfig.from_pretrained(source)
    assert config.model_type != "gated_llama"
    rope = {name: getattr(value, "expected", value) for name, value in rope.items()}  # numbers of approx()
    config.rope_parameters, config.max_position_embeddings = rope, length
    return load(source, config=config)(tokens).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits, which weights elsewhere in memory may move."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def gated(llama: Path, tmp_path: Path) -> Path:
    convert_checkpoint(llama, tmp_path / "gated", place="copy")
    return tmp_path / "gated"


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


def check_manifest(directory: Path) -> None:
    """Every file but the manifest is in it, with its size and, unless it is a hard link, its SHA-256."""
    files = in_json(directory / MANIFEST)["files"]
    assert files.keys() == contents(directory).keys() - {MANIFEST}
    for name, record in files.items():
        content = (directory / name).read_bytes()
        assert record["size"] == len(content), name
        assert record["sha256"] in (hashlib.sha256(content).hexdigest(), None), name
        assert record["sha256"] is not None or record["mtime_ns"] == (directory / name).stat().st_mtime_ns


@pytest.mark.parametrize("place", ["copy", "link"])
def test_an_extended_conversion_is_verified_and_ungated(
    place: str, llama: Path, gated: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    verify_checkpoint(llama, gated, tokens=16)  # which the extension makes obsolete
    before_source, before = contents(llama), contents(gated)
    source_records = {name: record.get("source") for name, record in in_json(gated / MANIFEST)["files"].items()}
    first, second = tmp_path / "first", tmp_path / "second"
    extend_checkpoint(gated, first, context=LONGER, place=place)
    done = extend_checkpoint(first, second, context={"length": 2048, "method": "yarn", "factor": 4}, place=place)
    assert done.before == "512 tokens, rope_theta 25,198"  # 10,000 * 2^(8/6)
    assert done.after == "2,048 tokens, rope_theta 25,198, yarn, factor 4, from 512"
    assert contents(gated) == before

    theta = 10_000 * 2 ** (8 / 6)
    for directory, rope, length, contexts in (
        (first, base(2), 512, [LONGER]),
        (
            second,
            yarn(2048, 512, pytest.approx(theta)),
            2048,
            [LONGER, {"length": 2048, "method": "yarn", "factor": 4}],
        ),
    ):
        config = in_json(directory / "config.json")
        changed = {"rope_parameters": rope, "max_position_embeddings": length}
        assert config == in_json(gated / "config.json") | changed
        ours = {"config.json", "README.md", MANIFEST}
        same, mine = contents(gated), contents(directory)
        assert mine.keys() == same.keys()
        assert all(mine[name] == same[name] for name in mine.keys() - ours)
        manifest = in_json(directory / MANIFEST)
        assert manifest["context"] == contexts
        assert manifest["verification"] is None
        check_manifest(directory)
        assert {name: record.get("source") for name, record in manifest["files"].items()} == source_records
        assert "not verified since the context was extended" in (directory / "README.md").read_text()

        expected = logits_by_transformers(llama, config["rope_parameters"], length, tokens)
        assert_close(logits_of(directory, tokens), expected)
        found = verify_checkpoint(llama, directory, tokens=16)
        assert found.passed and found.max_difference == 0 and not found.differing_fields
        words = f"{length:,} tokens, rope_theta 25,198" + (", yarn, factor 4, from 512" if length == 2048 else "")
        assert found.context == words
        assert found.summary()["context"] == f"the source's extended alike: {words}"
        assert found.recorded
        card = (directory / "README.md").read_text()
        assert f"| context | the source's extended alike: {words} |" in card
        assert "not verified since" not in card
        check_manifest(directory)

        restored = tmp_path / f"{directory.name}, restored"
        ungate_checkpoint(directory, restored, place=place)
        assert contents(restored) == before_source == contents(llama)
    assert in_json(second / MANIFEST)["command"] == (
        f"gated-llama convert {llama} {gated} --place copy "
        f"&& gated-llama extend {gated} {first} --context-length 512 --place {place} "
        f"&& gated-llama extend {first} {second} --context-length 2048 --factor 4 --yarn --place {place}"
    )


def test_a_sharded_conversion_with_scaled_positions(sharded: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    before = contents(sharded)
    convert_checkpoint(sharded, tmp_path / "gated", granularity="elementwise")
    with pytest.raises(ConversionError, match=r"rope_type='llama3', .*factor=8\.0.*replace_scaling=True"):
        extend_checkpoint(tmp_path / "gated", tmp_path / "longer", context=YARN)
    assert not (tmp_path / "longer").exists()
    extend_checkpoint(tmp_path / "gated", tmp_path / "longer", context=YARN | {"replace_scaling": True})
    assert in_json(tmp_path / "longer" / "config.json")["rope_parameters"] == yarn(1024, 64, 500_000.0)
    assert verify_checkpoint(sharded, tmp_path / "longer", tokens=16).max_difference == 0
    expected = logits_by_transformers(sharded, yarn(1024, 64, 500_000.0), 1024, tokens)
    assert_close(logits_of(tmp_path / "longer", tokens), expected)
    ungate_checkpoint(tmp_path / "longer", tmp_path / "back")
    assert contents(tmp_path / "back") == before == contents(sharded)


def test_verification_tells_of_a_context_that_is_not_the_recorded_one(llama: Path, gated: Path, tmp_path: Path) -> None:
    for name, change in (
        ("rope", lambda config: config["rope_parameters"].update(rope_theta=77_777.0)),
        ("plain", lambda config: config.update(in_json(gated / "config.json"))),
    ):
        extend_checkpoint(gated, tmp_path / name, context=LONGER)
        edit_json(tmp_path / name / "config.json", change)
        found = verify_checkpoint(llama, tmp_path / name, tokens=16)
        assert not found.passed
        assert found.differing_fields == ("rope_parameters",)
        assert found.max_difference > 1e-3
    assert verify_checkpoint(llama, gated, tokens=16).context is None
    # Nor does a manifest pass that tells of another extension than was made.
    edit_json(gated / MANIFEST, lambda manifest: manifest.update(context=[LONGER]))
    assert verify_checkpoint(llama, gated, tokens=16).differing_fields == ("rope_parameters",)


@pytest.mark.parametrize("context", [{"length": 512, "rope_theta": 1e6}, YARN])
def test_converting_with_a_context_is_converting_and_extending(
    context: dict[str, Any], llama: Path, gated: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    before = contents(llama)
    done = convert_checkpoint(llama, tmp_path / "at once", context=context)
    extend_checkpoint(gated, tmp_path / "after", context=context)
    config = in_json(tmp_path / "after" / "config.json")
    assert in_json(tmp_path / "at once" / "config.json") == config
    assert done.config.rope_parameters == config["rope_parameters"] != {"rope_type": "default", "rope_theta": 1e4}
    assert done.config.max_position_embeddings == context["length"]
    assert in_json(tmp_path / "at once" / MANIFEST)["context"] == [context]
    expected = logits_by_transformers(llama, config["rope_parameters"], context["length"], tokens)
    assert_close(logits_of(tmp_path / "at once", tokens), expected)
    assert_close(logits_of(tmp_path / "after", tokens), expected)
    # So does extending the source first.
    extend_checkpoint(llama, tmp_path / "source", context=context)
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    assert_close(logits_of(tmp_path / "converted", tokens), expected)
    found = verify_checkpoint(llama, tmp_path / "at once", tokens=16)
    assert found.max_difference == 0 and found.context is not None
    ungate_checkpoint(tmp_path / "at once", tmp_path / "back")
    assert contents(tmp_path / "back") == before == contents(llama)


@pytest.mark.parametrize(
    "source_config",
    [
        "llama, biases, llama3 rope",
        "mistral, sliding window",
        "qwen3, biases",
        "cwm, biases in the MLP",
        "seed_oss",
    ],
    indirect=True,
)
def test_other_families_are_extended(source_model: PreTrainedModel, tmp_path: Path, tokens: torch.Tensor) -> None:
    source_model.save_pretrained(tmp_path / "source")
    rope = source_model.config.rope_parameters
    original = rope.get("original_max_position_embeddings", 256)
    expected = yarn(16384, original, rope["rope_theta"]) | {
        name: value for name, value in rope.items() if name == "partial_rotary_factor"
    }
    context = {"length": 16384, "method": "yarn"}
    if rope["rope_type"] != "default":
        context["replace_scaling"] = True
    done = convert_checkpoint(tmp_path / "source", tmp_path / "gated", context=context)
    assert done.config.rope_parameters == expected
    assert verify_checkpoint(tmp_path / "source", tmp_path / "gated", tokens=16).max_difference == 0
    assert_close(
        logits_of(tmp_path / "gated", tokens),
        logits_by_transformers(tmp_path / "source", expected, 16384, tokens),
    )
    ungated = extend_checkpoint(tmp_path / "source", tmp_path / "longer", context=context)
    assert ungated.extension.rope_parameters == expected
    assert AutoConfig.from_pretrained(tmp_path / "longer").rope_parameters == expected


def test_a_dry_run_checks_the_context(llama: Path, tmp_path: Path) -> None:
    plan = plan_conversion(llama, tmp_path / "gated", context=YARN)
    assert plan.architecture.config.rope_parameters == yarn(1024, 256)
    with pytest.raises(ConversionError, match=r"config\.json: length=12 .* 256 tokens"):
        plan_conversion(llama, tmp_path / "gated", context={"length": 12})


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


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def train_a_gate(directory: Path) -> None:
    shard = max(directory.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.1.self_attn.g_proj.bias"] += 0.5
    save_file(tensors, shard, metadata={"format": "pt"})


def save_again(directory: Path) -> None:
    """As users do after loading it; other shards take the place of the ones in the manifest."""
    load(directory).save_pretrained(directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda path: flip(path / SHARD), rf"{SHARD}: is not what conversion wrote", id="base shard"),
        pytest.param(lambda path: grow(path / SHARD), SHARD, id="longer shard"),
        pytest.param(
            lambda path: grow(path / "tokenizer_config.json"), r"tokenizer_config\.json: is not what", id="side"
        ),
        pytest.param(
            lambda path: (path / "tokenizer_config.json").unlink(),
            "tokenizer_config",
            id="side gone",
        ),
        pytest.param(save_again, r"safetensors", id="saved again"),
        pytest.param(lambda path: (path / MANIFEST).write_text("{"), f"{MANIFEST}: not valid JSON", id="manifest"),
        pytest.param(train_a_gate, "safetensors: is not what conversion wrote", id="gates"),
    ],
)
def test_what_is_not_what_conversion_wrote_is_refused(
    spoil: Callable[[Path], object], message: str, gated: Path, tmp_path: Path
) -> None:
    spoil(gated)
    before = contents(tmp_path)
    with pytest.raises(ConversionError, match=message):
        extend_checkpoint(gated, tmp_path / "new" / "longer", context=YARN)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_changed_shard_does_not_pass_by_a_hard_link(gated: Path, tmp_path: Path) -> None:
    """Whether it is refused at once or when it is ungated."""
    flip(gated / SHARD)
    with pytest.raises(ConversionError, match=rf"{SHARD}: is not what conversion wrote"):
        extend_checkpoint(gated, tmp_path / "longer", context=YARN, place="link")
        ungate_checkpoint(tmp_path / "longer", tmp_path / "back")


def test_a_linked_shard_that_was_written_to_is_refused(llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated", place="link")
    (tmp_path / "gated" / SHARD).touch()
    with pytest.raises(ConversionError, match="was hard-linked, not hashed, and has another time stamp"):
        extend_checkpoint(tmp_path / "gated", tmp_path / "longer", context=YARN)
    assert not (tmp_path / "longer").exists()


def test_the_card_tells_the_last_extension(llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated", context=LONGER)
    assert "| context | extended to 512 tokens" in (tmp_path / "gated" / "README.md").read_text()
    extend_checkpoint(tmp_path / "gated", tmp_path / "longer", context=YARN)
    card = (tmp_path / "longer" / "README.md").read_text()
    assert "extended to 512 tokens" not in card
    assert "1,024 tokens" in card


BAD_CONTEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "shorter": ({"length": 12}, r"length=12 is not more than the 256 tokens"),
    "none": ({}, r"length"),
    "unknown argument": ({"length": 512, "scale": 2}, r"scale"),
    "lower base": ({"length": 512, "rope_theta": 5000.0}, r"rope_theta=5000\.0 .* 10000\.0"),
    "factor": (YARN | {"factor": 3}, r"factor=3 contradicts the lengths: 1024 / 256 = 4\.0"),
    "base with yarn": (YARN | {"rope_theta": 1e6}, r"rope_theta=1000000\.0 .* 10000\.0"),
    "method": ({"length": 512, "method": "ntk"}, r"method='ntk'"),
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


LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


@pytest.mark.parametrize(
    "rope",
    [
        pytest.param(LINEAR | {"factor": None}, id="factor null"),
        pytest.param(LINEAR | {"factor": "2"}, id="factor a string"),
        pytest.param({"rope_type": "default", "rope_theta": None}, id="base null"),
        pytest.param({"rope_type": "default", "rope_theta": "1e4"}, id="base a string"),
        pytest.param(
            {name: {"rope_type": "default", "rope_theta": 1e4} for name in ("full_attention", "sliding_attention")},
            id="per layer",
        ),
        pytest.param([], id="a list"),
    ],
)
def test_a_damaged_config_gets_a_line_that_names_it(rope: Any, gated: Path, tmp_path: Path) -> None:
    edit_json(gated / "config.json", lambda config: config.update(rope_parameters=rope))
    with pytest.raises(ConversionError, match=rf"{gated}/config\.json: "):
        extend_checkpoint(gated, tmp_path / "longer", context=YARN)
    assert not (tmp_path / "longer").exists()


def test_other_failures_leave_nothing_either(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    before = contents(tmp_path)
    with pytest.raises(ConversionError, match=r"model\.gguf: a GGUF file; gated-llama convert takes the same options"):
        extend_checkpoint(tmp_path / "model.gguf", tmp_path / "longer", context=YARN)
    with pytest.raises(ConversionError, match="nowhere: no such file or directory"):
        extend_checkpoint(tmp_path / "nowhere", tmp_path / "longer", context=YARN)
    with pytest.raises(ConversionError, match=f"--revision main: {llama} is a path"):
        extend_checkpoint(llama, tmp_path / "longer", context=YARN, revision="main")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_gated.conversion.shards.place_file", fail)
    with pytest.raises(KeyboardInterrupt):
        extend_checkpoint(llama, tmp_path / "new" / "longer", context=YARN)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "model.gguf"}


def test_what_may_be_overwritten(llama: Path, tmp_path: Path) -> None:
    before = contents(llama)
    extend_checkpoint(llama, tmp_path / "longer", context=LONGER)
    first = contents(tmp_path / "longer")
    with pytest.raises(ConversionError, match="longer: already exists; --overwrite replaces it"):
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


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_extends(llama: Path, gated: Path, tmp_path: Path) -> None:
    (llama / "tokenizer_config.json").write_text('{"model_max_length": 300}')
    code, out, err = run("extend", llama, tmp_path / "longer", "--context-length", "512", "--rope-theta", "1e6")
    assert code == 0
    assert f"{'before':18}256 tokens, rope_theta 10,000\n" in out
    assert f"{'after':18}512 tokens, rope_theta 1,000,000\n" in out
    assert f"{'result':18}{tmp_path / 'longer'}\n" in out
    assert err.startswith("note: tokenizer_config.json has model_max_length=300")
    assert err.count("\n") == 1
    options = ("--context-length", "1024", "--yarn", "--factor", "8", "--original-max-position-embeddings", "128")
    code, out, err = run("extend", gated, tmp_path / "yarn", *options, "--place", "link")
    assert (code, err) == (0, "")
    assert f"{'after':18}1,024 tokens, rope_theta 10,000, yarn, factor 8, from 128\n" in out
    assert f"{'weights shared':18}" in out
    assert in_json(tmp_path / "yarn" / "config.json")["rope_parameters"] == yarn(1024, 128)
    code, out, err = run("extend", tmp_path / "yarn", tmp_path / "again", "--context-length", "2048", "--yarn")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "rope_type='yarn', " in err and "factor=8.0, " in err
    options = ("--context-length", "2048", "--yarn", "--replace-scaling")
    code, out, _ = run("extend", tmp_path / "yarn", tmp_path / "again", *options)
    assert code == 0
    assert f"{'before':18}1,024 tokens, rope_theta 10,000, yarn, factor 8, from 128\n" in out
    assert in_json(tmp_path / "again" / "config.json")["rope_parameters"] == yarn(2048, 128)
    assert [*in_json(tmp_path / "again" / MANIFEST)["context"][1]] == ["length", "replace_scaling", "method"]


def test_the_recorded_command_can_be_run_again(llama: Path, tmp_path: Path) -> None:
    """It makes the same config."""
    for name, context in (("base", {"length": 512, "rope_theta": 1e6}), ("yarn", YARN | {"replace_scaling": True})):
        convert_checkpoint(llama, tmp_path / name, context=context, granularity="elementwise")
        before = contents(tmp_path / name)
        command = in_json(tmp_path / name / MANIFEST)["command"].split()
        shutil.rmtree(tmp_path / name)
        assert run(*command[1:])[0] == 0
        after = contents(tmp_path / name)
        assert {name for name in before if before[name] != after[name]} <= {MANIFEST}


def test_the_command_converts_to_a_longer_context(llama: Path, tmp_path: Path) -> None:
    options = ("--context-length", "1024", "--yarn")
    code, out, err = run("convert", llama, tmp_path / "gated", *options, "--dry-run")
    assert (code, err) == (0, "")
    assert not (tmp_path / "gated").exists()
    assert run("convert", llama, tmp_path / "gated", *options)[0] == 0
    assert in_json(tmp_path / "gated" / "config.json")["rope_parameters"] == yarn(1024, 256)
    assert in_json(tmp_path / "gated" / MANIFEST)["context"] == [YARN]
    code, out, _ = run("verify", llama, tmp_path / "gated", "--tokens", "20")
    assert code == 0
    words = "the source's extended alike: 1,024 tokens, rope_theta 10,000, yarn, factor 4, from 256"
    assert f"\n{'context':18}{words}\n" in out
    assert "max difference    0\n" in out
    assert run("ungate", tmp_path / "gated", tmp_path / "back")[0] == 0
    assert contents(tmp_path / "back") == contents(llama)


def test_the_command_that_converts_tells_of_the_context_too(llama: Path, tmp_path: Path) -> None:
    (llama / "tokenizer_config.json").write_text('{"model_max_length": 300}')
    _, out, err = run("convert", llama, tmp_path / "gated", "--context-length", "1024", "--yarn")
    assert f"\n{'context':18}1,024 tokens, rope_theta 10,000, yarn, factor 4, from 256\n" in out
    assert "model_max_length=300" in err


@pytest.mark.parametrize("command", ["convert", "extend"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context-length", "12"], ["length=12 ", "256 tokens"]),
        (["--context-length", "256", "--yarn"], ["length=256 ", "256 tokens"]),
        (["--context-length", "512", "--rope-theta", "9000"], ["rope_theta=9000.0", "10000.0"]),
        (["--context-length", "512", "--rope-theta", "nan"], ["rope_theta=nan", "10000.0"]),
        (["--context-length", "512", "--yarn", "--factor", "3"], ["factor=3.0", "512 / 256 = 2.0"]),
        (["--context-length", "512", "--factor", "2"], ["factor=2.0", "yarn"]),
        (["--context-length", "512", "--yarn", "--rope-theta", "1e6"], ["rope_theta=1000000.0", "10000.0"]),
        (["--context-length", "512", "--original-max-position-embeddings", "600"], ["length=512", "600 tokens"]),
    ],
)
def test_contradictions_get_one_line_with_the_numbers(
    command: str, options: list[str], words: list[str], llama: Path, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    code, out, err = run(command, llama, tmp_path / "longer", *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {llama}/config.json: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--yarn"],
        ["--rope-theta", "1e6"],
        ["--factor", "2"],
        ["--original-max-position-embeddings", "128"],
        ["--replace-scaling"],
        ["--context-length", "0"],
        ["--context-length", "many"],
    ],
)
def test_bad_usage_names_the_option(options: list[str], llama: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    for command in ("convert", "extend"):
        code, out, err = run(command, llama, tmp_path / "longer", *options)
        assert (code, out) == (2, "")
        assert "--context-length" in err
        assert options[0] in err or command == "extend"
        assert set(tmp_path.rglob("*")) == before

"""Conversions with longer contexts pass verification and give the source back; what was changed since is refused."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from modeling_gated.conversion import (
    ConversionError,
    convert_checkpoint,
    extend_checkpoint,
    plan_conversion,
    ungate_checkpoint,
    verify_checkpoint,
)
from tests.helpers.checkpoints import contents
from tests.helpers.close_tensors import assert_close
from tests.helpers.extended_checkpoints import (
    LONGER,
    MANIFEST,
    YARN,
    edit_json,
    in_json,
    load,
    logits_by_transformers,
    logits_of,
    yarn,
)


SHARD = "model-00001-of-00002.safetensors"


def base(factor: float, theta: float = 10_000.0, head_dim: int = 8) -> dict[str, Any]:
    """The larger base by the rule."""
    return {"rope_type": "default", "rope_theta": pytest.approx(theta * factor ** (head_dim / (head_dim - 2)))}


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
        verification = verify_checkpoint(llama, directory, tokens=16)
        assert verification.passed and verification.max_difference == 0 and not verification.differing_fields
        words = f"{length:,} tokens, rope_theta 25,198" + (", yarn, factor 4, from 512" if length == 2048 else "")
        assert verification.context == words
        assert verification.summary()["context"] == f"the source's extended alike: {words}"
        assert verification.recorded
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
        verification = verify_checkpoint(llama, tmp_path / name, tokens=16)
        assert not verification.passed
        assert verification.differing_fields == ("rope_parameters",)
        assert verification.max_difference > 1e-3
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
    verification = verify_checkpoint(llama, tmp_path / "at once", tokens=16)
    assert verification.max_difference == 0 and verification.context is not None
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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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

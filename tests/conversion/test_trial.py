"""Configs with which no model runs are refused before anything is written, and named by their field."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config
from typer.testing import CliRunner

from modeling_gated.cli import app
from modeling_gated.conversion import (
    ConversionError,
    convert_checkpoint,
    extend_checkpoint,
    plan_conversion,
    verify_checkpoint,
)
from tests.helpers.source_models import SIZES


FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def source(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """Write a checkpoint whose config.json has these fields; a field that is ... is left out."""
    config: PreTrainedConfig = FAMILIES[family](**SIZES, head_dim=8)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    raw = json.loads((directory / "config.json").read_text()) | changes
    raw = {name: value for name, value in raw.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


CANNOT_RUN: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope_theta null": ("llama", {"rope_parameters": ..., "rope_theta": None}, "rope_theta=None"),
    "rope_theta null, of mistral": ("mistral", {"rope_parameters": ..., "rope_theta": None}, "rope_theta=None"),
    "rope_theta a string": ("qwen3", {"rope_parameters": ..., "rope_theta": "1e6"}, "rope_theta='1e6'"),
    "rope_theta 0": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        "rope_parameters.rope_theta=0",
    ),
    "rope_theta negative": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}},
        "rope_parameters.rope_theta=-5.0",
    ),
    "a factor that is a string": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}},
        "rope_parameters={",
    ),
    "an attention_factor that is a string": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": "x"}},
        "rope_parameters.attention_factor='x'",
    ),
    "a type of RoPE that is unknown": (
        "llama",
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        "rope_parameters={",
    ),
    "YaRN of a part of each head": (
        "llama",
        {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5",
    ),
    "padding beyond the vocabulary": ("llama", {"pad_token_id": SIZES["vocab_size"]}, "pad_token_id=96"),
    "padding before the vocabulary": ("qwen3", {"pad_token_id": -200}, "pad_token_id=-200"),
    "no ModelOutput": ("llama", {"return_dict": False}, "return_dict=False"),
    "a negative epsilon": ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
    "a window that is a string": ("llama", {"sliding_window": "8"}, "sliding_window='8'"),
    "a cache that is unknown": ("llama", {"cache_implementation": "huge"}, "cache_implementation='huge'"),
    "a kind of layer that Llama lacks": (
        "llama",
        {"layer_types": ["full_attention", "full_attention", "linear_attention"]},
        "layer_types=[",
    ),
}


@pytest.mark.parametrize(("family", "changes", "named"), CANNOT_RUN.values(), ids=CANNOT_RUN)
def test_a_config_that_cannot_run_is_refused(tmp_path: Path, family: str, changes: dict[str, Any], named: str) -> None:
    path = source(tmp_path / "source", family, **changes)
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(path, tmp_path / "gated")
    assert str(error.value).startswith(f"{path / 'config.json'}: {named}")
    assert str(error.value).endswith("correct the field")
    assert "\n" not in str(error.value)
    with pytest.raises(ConversionError, match="cannot run"):
        plan_conversion(path, tmp_path / "gated")
    assert [child.name for child in tmp_path.iterdir()] == ["source"]


def test_of_two_fields_that_are_wrong_one_is_named(tmp_path: Path) -> None:
    path = source(tmp_path / "source", pad_token_id=96, rms_norm_eps=-1.0)
    with pytest.raises(ConversionError, match="pad_token_id=96: the model cannot run with it: AssertionError"):
        convert_checkpoint(path, tmp_path / "gated")


def test_only_fields_of_the_file_are_named_and_warnings_are_kept_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Transformers' configs write into rope_scaling, and warn of its fields each time they are made."""
    path = source(
        tmp_path / "source", rope_parameters=..., rope_theta=None, rope_scaling={"type": "linear", "factor": 2.0}
    )
    with pytest.raises(ConversionError, match=r"config.json: rope_theta=None: "):
        convert_checkpoint(path, tmp_path / "gated")
    raw = json.loads((path / "config.json").read_text()) | {"rope_theta": 1e4, "rope_scaling": {"rope_type": "spiral"}}
    (path / "config.json").write_text(json.dumps(raw))
    capfd.readouterr()
    with pytest.raises(ConversionError, match=r"rope_scaling=\{'rope_type': 'spiral'\}: "):
        convert_checkpoint(path, tmp_path / "gated")
    assert len(capfd.readouterr().err.splitlines()) < 5


def test_what_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    """JSON has no infinity: Transformers writes a dict, which no RoPE can read."""
    path = source(tmp_path / "source", rope_parameters=...)
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.rstrip()[:-1] + ', "rope_theta": 1e400}')
    with pytest.raises(ConversionError, match="rope_theta=inf: the model cannot run with it"):
        convert_checkpoint(path, tmp_path / "gated")


def test_many_fields_take_no_longer(tmp_path: Path) -> None:
    junk = {f"junk_{number}": number for number in range(2_000)}
    path = source(tmp_path / "source", **junk, pad_token_id=-200, rms_norm_eps=-1.0)
    started = time.perf_counter()
    with pytest.raises(ConversionError, match="the model cannot run"):
        convert_checkpoint(path, tmp_path / "gated")
    assert time.perf_counter() - started < 60


def test_an_empty_quantization_config_is_refused(tmp_path: Path) -> None:
    """Transformers refuses it, too."""
    path = source(tmp_path / "source", quantization_config={})
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(ConversionError, match="quantization_config: quant_method=None"):
        convert_checkpoint(path, tmp_path / "gated")


@pytest.mark.parametrize("value", [[], "", 0, "int8"], ids=repr)
def test_a_quantization_config_that_is_no_object_is_refused(tmp_path: Path, value: Any) -> None:
    path = source(tmp_path / "source", quantization_config=value)
    with pytest.raises(ConversionError, match=re.escape(f"quantization_config={value!r} is not an object")):
        convert_checkpoint(path, tmp_path / "gated")


def test_a_window_that_only_the_source_s_cache_applies_is_noted(tmp_path: Path) -> None:
    """The result generates what the source generates without the field, and without a cache."""
    path = source(tmp_path / "source", sliding_window=4)
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "gated")])
    assert done.exit_code == 0
    assert "note: config.json: sliding_window=4 is not read by a llama model" in done.stderr
    ids = torch.arange(1, 20)[None]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "gated").generate(ids, **options)
    expected = AutoModelForCausalLM.from_pretrained(path).generate(ids, **options, use_cache=False)
    assert torch.equal(actual, expected)
    assert convert_checkpoint(source(tmp_path / "plain"), tmp_path / "other").config_notes == ()
    mistral = source(tmp_path / "mistral", "mistral", sliding_window=4)
    assert convert_checkpoint(mistral, tmp_path / "windowed").config_notes == ()


HARMLESS: dict[str, dict[str, Any]] = {
    "padding that counts from the end": {"pad_token_id": -1},
    "a part of each head, which plain RoPE ignores": {"partial_rotary_factor": 0.5},
    "no quantization": {"quantization_config": None},
    "dynamic RoPE": {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "no cache": {"use_cache": False},
    "hidden states as well": {"output_hidden_states": True},
    "attention as well": {"output_attentions": True},
}


@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS)
def test_a_config_that_runs_is_converted(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = source(tmp_path / "source", **changes)
    state = torch.random.get_rng_state()
    convert_checkpoint(path, tmp_path / "gated")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert verify_checkpoint(path, tmp_path / "gated", tokens=20).passed


KERNELS = {
    "eager": {"attn_implementation": "eager"},
    "of each part": {"attn_implementation": {"": "eager"}},
    "by the older name": {"_attn_implementation": "eager"},
    "flex": {"attn_implementation": "flex_attention"},
    "flash, which this machine lacks": {"attn_implementation": "flash_attention_2"},
    "a kernel of the hub": {"attn_implementation": "kernels-community/flash-attn3"},
    "of experts, which Llama lacks": {"experts_implementation": "grouped_mm"},
}


@pytest.mark.parametrize("changes", KERNELS.values(), ids=KERNELS)
def test_verify_runs_both_models_alike_whatever_kernel_a_config_names(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = source(tmp_path / "source", **changes)
    convert_checkpoint(path, tmp_path / "gated")
    verification = verify_checkpoint(path, tmp_path / "gated", tokens=50)
    assert verification.verdict.startswith("identical") and verification.max_difference == 0
    converted = json.loads((tmp_path / "gated" / "config.json").read_text())
    if "experts_implementation" not in changes:  # so that Transformers runs the result as it runs the source
        assert [converted["attn_implementation"]] == list(changes.values())


def test_what_a_gated_config_says_of_its_run_changes_nothing(tmp_path: Path) -> None:
    path = source(tmp_path / "source")
    convert_checkpoint(path, tmp_path / "gated")
    file = tmp_path / "gated" / "config.json"
    run = {"return_dict": False, "attn_implementation": "flash_attention_2"}
    file.write_text(json.dumps(json.loads(file.read_text()) | run))
    assert verify_checkpoint(path, tmp_path / "gated", tokens=20).passed


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_extension_that_cannot_run_is_refused(tmp_path: Path, family: str, is_gated: bool) -> None:
    """Plain RoPE ignores partial_rotary_factor in these families; YaRN reads it."""
    path = source(tmp_path / "source", family, partial_rotary_factor=0.5)
    if is_gated:
        convert_checkpoint(path, tmp_path / "gated")
        path = tmp_path / "gated"
    before = sorted(child.name for child in tmp_path.iterdir())
    with pytest.raises(ConversionError, match=r"partial_rotary_factor.*the model cannot run") as error:
        extend_checkpoint(path, tmp_path / "extended", context={"length": 1024, "method": "yarn"})
    assert str(error.value).startswith(str(path / "config.json"))
    with pytest.raises(ConversionError, match="the model cannot run"):
        convert_checkpoint(tmp_path / "source", tmp_path / "extended", context={"length": 1024, "method": "yarn"})
    assert sorted(child.name for child in tmp_path.iterdir()) == before
    extend_checkpoint(path, tmp_path / "extended", context={"length": 1024})  # a larger base: plain RoPE

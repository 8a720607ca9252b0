"""Longer contexts of configs are RoPE and YaRN by the papers' formulas; contradictions are refused with the numbers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.configuration import describe_context, extend_context
from tests.helpers.rope_reference import (
    HEAD_DIM,
    SCALED,
    check_rotation,
    config_of,
    frequencies,
    plain_frequencies,
    relative_difference,
    rotary_of,
    small_config,
    yarn_frequencies,
    yarn_frequencies_by_turns,
    yarn_of,
)
from tests.helpers.source_models import SIZES, randomize
from tests.helpers.tiny_configs import tiny_llama


LENGTH = SIZES["max_position_embeddings"]  # 256


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_000_000.0])
def test_yarn_of_a_model_is_what_the_papers_formulas_give(theta: float, head_dim: int) -> None:
    for original, length in ((4096, 8192), (2048, 3000), (4096, 32768), (32768, 131072)):
        factor = length / original
        expected = yarn_frequencies(theta, head_dim, factor, original)
        # Otherwise this test could not tell the ramps apart.
        assert relative_difference(yarn_frequencies(theta, head_dim, factor, original, truncate=False), expected) > 1e-3
        assert relative_difference(yarn_frequencies_by_turns(theta, head_dim, factor, original), expected) > 1e-2

        model = GatedLlamaForCausalLM(small_config(theta, head_dim, original))
        assert relative_difference(frequencies(model), plain_frequencies(theta, head_dim)) < 1e-6
        extend_context(model, length, "yarn")
        assert relative_difference(frequencies(model), expected) < 1e-6
        attention_factor = 0.1 * math.log(factor) + 1
        assert math.isclose(rotary_of(model).attention_scaling, attention_factor, rel_tol=1e-12)
        check_rotation(rotary_of(model), expected, attention_factor)


@pytest.mark.parametrize("method", ["yarn", "rope_base"])
def test_transformers_own_llama_reads_the_saved_config_alike(method: str, tmp_path: Path) -> None:
    config = small_config(500_000.0, 64, 8192)
    extend_context(config, 65536, method)
    config.save_pretrained(tmp_path / "gated")
    tiny_llama(
        head_dim=64,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=config.rope_parameters,
    ).save_pretrained(tmp_path / "llama")
    theta = 500_000.0 * 8 ** (64 / 62)
    expected = yarn_frequencies(500_000.0, 64, 8, 8192) if method == "yarn" else plain_frequencies(theta, 64)
    for directory in ("gated", "llama"):
        reloaded = AutoConfig.from_pretrained(tmp_path / directory)
        assert reloaded.model_type == {"gated": "gated_llama"}.get(directory, directory)
        assert reloaded.rope_parameters == config.rope_parameters
        assert reloaded.max_position_embeddings == 65536
        check_rotation(LlamaRotaryEmbedding(reloaded), expected, 0.1 * math.log(8) + 1 if method == "yarn" else 1.0)


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_yarn_writes_every_field(theta: float) -> None:
    config = small_config(theta, 128, 4096)
    done = extend_context(config, 32768, "yarn", factor=8)
    assert config.rope_parameters == done.rope_parameters
    assert done.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": pytest.approx(1.2079441541679836, rel=1e-15),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
    assert config.max_position_embeddings == done.max_position_embeddings == 32768
    assert done.previous_rope_parameters == {"rope_type": "default", "rope_theta": theta}
    assert done.previous_max_position_embeddings == 4096


def test_yarn_starts_from_the_original_length_that_is_given() -> None:
    config = small_config(10_000.0, 64, 8192)
    extend_context(config, 16384, "yarn", original_max_position_embeddings=4096)
    assert config.rope_parameters["factor"] == 4
    assert config.rope_parameters["original_max_position_embeddings"] == 4096
    assert config.max_position_embeddings == 16384


def test_the_given_base_is_taken() -> None:
    model = GatedLlamaForCausalLM(small_config(10_000.0, 128, 4096))
    extend_context(model, 32768, rope_theta=1e6)
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert model.config.max_position_embeddings == 32768
    assert relative_difference(frequencies(model), plain_frequencies(1e6, 128)) < 1e-6
    # Of the same length, too: then it is the base alone that is raised.
    extend_context(model, 32768, rope_theta=5e6)
    assert relative_difference(frequencies(model), plain_frequencies(5e6, 128)) < 1e-6


@pytest.mark.parametrize(
    ("theta", "head_dim", "original", "length", "expected"),
    [
        (10_000.0, 128, 4096, 32768, 82_684.62264),  # 10,000 * 8^(128/126)
        (500_000.0, 64, 8192, 131072, 8_748_479.27007),  # 500,000 * 16^(64/62)
    ],
)
def test_the_base_by_the_rule(theta: float, head_dim: int, original: int, length: int, expected: float) -> None:
    """With it the slowest pair turns as far over the new length as over the old."""
    model = GatedLlamaForCausalLM(small_config(theta, head_dim, original))
    slowest = frequencies(model)[-1] * original
    extend_context(model, length)
    actual = model.config.rope_parameters
    assert actual == {"rope_type": "default", "rope_theta": pytest.approx(expected, rel=1e-9)}
    assert relative_difference(frequencies(model), plain_frequencies(expected, head_dim)) < 1e-6
    assert frequencies(model)[-1] * length == pytest.approx(slowest, rel=2e-6)
    assert frequencies(model)[0] == 1


@pytest.mark.parametrize("through_llama", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_plain_rope_in_old_and_new_spellings(fields: dict[str, Any], through_llama: bool) -> None:
    for method, expected in (("yarn", 5e5), ("rope_base", 5e5 * 4 ** (HEAD_DIM / (HEAD_DIM - 2)))):
        config = config_of(fields, through_llama)
        extend_context(config, 4 * LENGTH, method)
        assert config.rope_parameters["rope_theta"] == pytest.approx(expected, rel=1e-12)
        assert config.rope_parameters["rope_type"] == ("yarn" if method == "yarn" else "default")
        assert "type" not in config.rope_parameters
        assert "rope_scaling" not in config.to_dict()


@pytest.mark.parametrize("through_llama", [False, True])
@pytest.mark.parametrize("case", list(SCALED))
def test_a_scaling_that_is_there_is_left_alone_or_replaced(case: str, through_llama: bool) -> None:
    fields, original = SCALED[case]
    name = case.partition(",")[0]
    for method in ("yarn", "rope_base"):
        config = config_of(fields, through_llama)
        before = config.to_dict()
        with pytest.raises(ValueError, match=rf"rope_type='{name}', .*=\d.*replace_scaling=True"):
            extend_context(config, 1024, method)
        assert config.to_dict() == before
        length = {}
        if original is None:
            with pytest.raises(ValueError, match=f"'{name}' does not say .*original_max_position_embeddings has to be"):
                extend_context(config, 1024, method, replace_scaling=True)
            assert config.to_dict() == before
            length = {"original_max_position_embeddings": 128}
        start = original or 128
        extend_context(config, 1024, method, replace_scaling=True, **length)
        assert config.max_position_embeddings == 1024
        if method == "yarn":
            assert config.rope_parameters == yarn_of(
                1024,
                start,
                original_max_position_embeddings=start,
                attention_factor=pytest.approx(0.1 * math.log(1024 / start) + 1),
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=True,
            )
        else:
            theta = 5e5 * (1024 / start) ** (HEAD_DIM / (HEAD_DIM - 2))
            assert config.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(theta)}


NONSENSE: dict[str, tuple[dict[str, Any], list[str]]] = {
    # arguments of extend_context for a config of 256 tokens and rope_theta 10,000; words of the message
    "shorter": ({"length": 255}, ["length=255", "256 tokens"]),
    "shorter, yarn": ({"length": 255, "method": "yarn"}, ["length=255", "256 tokens"]),
    "shorter, with a base": ({"length": 255, "rope_theta": 1e6}, ["length=255", "256 tokens"]),
    "equal": ({"length": 256}, ["length=256", "256 tokens"]),
    "equal, yarn": ({"length": 256, "method": "yarn"}, ["length=256", "256 tokens"]),
    "equal to the original": (
        {"length": 512, "method": "yarn", "original_max_position_embeddings": 512},
        ["length=512", "512 tokens"],
    ),
    "zero": ({"length": 0}, ["length must be a number of tokens, got 0"]),
    "negative": ({"length": -1024}, ["length must be a number of tokens, got -1024"]),
    "a bool": ({"length": True}, ["length must be a number of tokens, got True"]),
    "a float": ({"length": 1024.0}, ["length must be a number of tokens, got 1024.0"]),
    "a string": ({"length": "1024"}, ["length must be a number of tokens, got '1024'"]),
    "zero, yarn": ({"length": 0, "method": "yarn"}, ["length must be a number of tokens, got 0"]),
    "lower base": ({"length": 1024, "rope_theta": 9999.0}, ["rope_theta=9999.0", "10000.0"]),
    "negative base": ({"length": 1024, "rope_theta": -1e6}, ["rope_theta=-1000000.0", "10000.0"]),
    "same base and length": ({"length": 256, "rope_theta": 10_000.0}, ["rope_theta=10000.0", "10000.0"]),
    "nan": ({"length": 1024, "rope_theta": math.nan}, ["rope_theta=nan", "10000.0"]),
    "inf": ({"length": 1024, "rope_theta": math.inf}, ["rope_theta=inf", "10000.0"]),
    "factor contradicts": (
        {"length": 1024, "method": "yarn", "factor": 3.0},
        ["factor=3.0", "1024 / 256 = 4.0"],
    ),
    "factor contradicts the given original": (
        {"length": 1024, "method": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ["factor=4.0", "1024 / 128 = 8.0"],
    ),
    "factor nan": ({"length": 1024, "method": "yarn", "factor": math.nan}, ["factor=nan", "4.0"]),
    "factor without yarn": ({"length": 1024, "factor": 4.0}, ["factor=4.0", "'yarn'", "'rope_base'"]),
    "base with yarn": (
        {"length": 1024, "method": "yarn", "rope_theta": 1e6},
        ["rope_theta=1000000.0", "10000.0", "'yarn'"],
    ),
    "method": ({"length": 1024, "method": "ntk"}, ["method must be 'rope_base' or 'yarn', got 'ntk'"]),
    "original zero": (
        {"length": 1024, "original_max_position_embeddings": 0},
        ["original_max_position_embeddings must be a number of tokens, got 0"],
    ),
    "original a bool": (
        {"length": 1024, "original_max_position_embeddings": True},
        ["original_max_position_embeddings must be a number of tokens, got True"],
    ),
    "original a float": (
        {"length": 1024, "method": "yarn", "original_max_position_embeddings": 128.0},
        ["original_max_position_embeddings must be a number of tokens, got 128.0"],
    ),
}


@pytest.fixture(scope="module")
def llama_model() -> LlamaForCausalLM:
    """For tests that leave it as it is."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("case", list(NONSENSE))
@torch.no_grad()
def test_nonsense_is_refused_with_the_numbers_and_changes_nothing(
    case: str, llama_model: LlamaForCausalLM, tokens: torch.Tensor
) -> None:
    arguments, words = NONSENSE[case]
    before, logits = llama_model.config.to_dict(), llama_model(tokens).logits
    for config_or_model in (llama_model, llama_model.config):
        with pytest.raises(ValueError) as error:
            extend_context(config_or_model, **arguments)
        assert all(word in str(error.value) for word in words), error.value
        assert "\n" not in str(error.value)
    assert llama_model.config.to_dict() == before
    assert torch.equal(llama_model(tokens).logits, logits)


def test_what_is_no_config_and_no_model_of_one_is_refused() -> None:
    for nothing, words in ((nn.Linear(2, 2), "Linear has no rotary module"), ({}, "dict is neither a config nor a")):
        with pytest.raises(ValueError, match=words):
            extend_context(nothing, 1024)
    with pytest.raises(ValueError, match="PreTrainedConfig has no rope_parameters"):
        config = PreTrainedConfig()
        config.max_position_embeddings = 256
        extend_context(config, 1024)


def test_rope_that_differs_from_layer_to_layer_is_refused() -> None:
    config = LlamaConfig(**SIZES)
    config.rope_parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 12345.0},
    }
    with pytest.raises(ValueError, match=r"12345\.0.*differ from layer to layer"):
        extend_context(config, 1024)
    models = nn.ModuleList([LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": n})) for n in (64, 256)])
    with pytest.raises(ValueError, match="rotary modules of different rope_parameters"):
        extend_context(models, 1024)
    assert [model.config.max_position_embeddings for model in models] == [64, 256]


def test_what_was_changed_by_hand_since_is_not_undone() -> None:
    for field, value in (("max_position_embeddings", 999), ("rope_parameters", {"rope_type": "default"})):
        config = LlamaConfig(**SIZES)
        done = extend_context(config, 1024)
        setattr(config, field, value)
        with pytest.raises(ValueError, match=r"changed since"):
            done.undo()
        assert getattr(config, field) == value


def test_what_is_returned_is_no_part_of_the_config() -> None:
    config = LlamaConfig(**SIZES)
    done = extend_context(config, 1024, "yarn")
    config.rope_parameters["factor"] = 5.0
    assert done.rope_parameters["factor"] == 4.0
    config.rope_parameters["factor"] = 4.0
    done.undo()
    config.rope_parameters["rope_theta"] = 7.0
    assert done.previous_rope_parameters["rope_theta"] == 1e4


def test_describe_context() -> None:
    config = LlamaConfig(**SIZES)
    assert describe_context(config) == "256 tokens, rope_theta 10,000"
    extend_context(config, 4096, rope_theta=1e6)
    assert describe_context(config) == "4,096 tokens, rope_theta 1,000,000"
    extend_context(config, 32768, "yarn")
    assert describe_context(config) == "32,768 tokens, rope_theta 1,000,000, yarn, factor 8, from 4,096"


def test_an_original_length_beside_rope_parameters_follows() -> None:
    """Some configs have it there, where Transformers puts it before that of rope_parameters."""
    config = LlamaConfig(**SIZES, original_max_position_embeddings=16)
    extend_context(config, 1024, "yarn")
    expected = yarn_frequencies(1e4, HEAD_DIM, 4, 256)
    assert relative_difference(yarn_frequencies(1e4, HEAD_DIM, 4, 16), expected) > 1e-2
    assert relative_difference(LlamaRotaryEmbedding(config).inv_freq.double().numpy(), expected) < 1e-6
    assert config.rope_parameters["original_max_position_embeddings"] == 256


def test_undo_gives_back_an_original_length_beside_rope_parameters() -> None:
    config = LlamaConfig(**SIZES, original_max_position_embeddings=16)
    before = config.to_dict()
    extend_context(config, 1024, "yarn").undo()
    assert config.to_dict() == before


def test_a_refusal_leaves_rope_parameters_as_they_were() -> None:
    """Of a config that Transformers has not standardized since they were set."""
    config = LlamaConfig(**SIZES)
    config.rope_parameters = {"rope_theta": 1e4}
    with pytest.raises(ValueError, match="length=100 "):
        extend_context(config, 100)
    assert config.rope_parameters == {"rope_theta": 1e4}


def test_one_pair_of_channels_has_no_base_by_the_rule() -> None:
    config = small_config(1e4, 2, 256)
    with pytest.raises(ValueError, match="head_dim=2 has one pair"):
        extend_context(config, 1024)
    extend_context(config, 1024, rope_theta=1e5)


@pytest.mark.parametrize(("method", "digits"), [("rope_base", 305), ("rope_base", 400), ("yarn", 400)])
def test_lengths_beyond_float64_are_refused_too(method: str, digits: int) -> None:
    config = LlamaConfig(**SIZES)
    before = config.to_dict()
    with pytest.raises(ValueError, match="length must be a number of tokens, got 1000"):
        extend_context(config, 10**digits, method)
    assert config.to_dict() == before


@pytest.mark.parametrize("method", ["rope_base", "yarn"])
def test_a_model_is_not_shortened(method: str) -> None:
    """Even if it was trained at less than it says it is for."""
    config = LlamaConfig(**SIZES)
    before = config.to_dict()
    with pytest.raises(ValueError, match="length=200 is less than max_position_embeddings=256"):
        extend_context(config, 200, method, original_max_position_embeddings=128)
    assert config.to_dict() == before


def test_fields_of_another_kind_of_rope_are_not_dropped() -> None:
    config = LlamaConfig(**SIZES)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}
    with pytest.raises(ValueError, match="mrope_section is not known of a plain RoPE"):
        extend_context(config, 1024)


@pytest.mark.parametrize("name", ["rope_theta", "factor"])
@pytest.mark.parametrize("value", [10**400, True, "2"])
def test_what_is_no_number_is_refused(name: str, value: object) -> None:
    method = "yarn" if name == "factor" else "rope_base"
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        extend_context(LlamaConfig(**SIZES), 1024, method, **{name: value})

"""Longer contexts of configs and of loaded models, against RoPE and YaRN in float64 NumPy by the papers' formulas."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gated_models import gated_model
from source_models import LLAMA3_ROPE, SIZES, randomize
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_gated import (
    GatedLlamaConfig,
    GatedLlamaForCausalLM,
    GatedLlamaForSequenceClassification,
    GatedLlamaModel,
)
from modeling_gated.configuration import describe_context, extend_context


LENGTH = SIZES["max_position_embeddings"]  # 256
HEAD_DIM = SIZES["hidden_size"] // SIZES["num_attention_heads"]  # 8


def plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """RoPE's, in radians per token: theta^(-2i/d) of pair i."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def yarn_frequencies(theta: float, head_dim: int, factor: float, original: int, truncate: bool = True) -> np.ndarray:
    """YaRN's as in its authors' code: a ramp over pairs from the one that turns 32 times to the one that turns once."""
    plain = plain_frequencies(theta, head_dim)

    def pair(turns: int) -> float:
        # original * theta^(-2i/d) = 2 pi turns, solved for i
        return head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair(32), pair(1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def yarn_frequencies_by_turns(theta: float, head_dim: int, factor: float, original: int) -> np.ndarray:
    """YaRN's as in the paper, arXiv 2309.00071, Eq. 18 and 19: a ramp over the number of turns r."""
    plain = plain_frequencies(theta, head_dim)
    gamma = np.clip((original * plain / (2 * np.pi) - 1) / (32 - 1), 0, 1)
    return (1 - gamma) * plain / factor + gamma * plain


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found / expected - 1).max())


def rotary_of(model: nn.Module) -> nn.Module:
    (found,) = (module for module in model.modules() if isinstance(module, LlamaRotaryEmbedding))
    return found


def frequencies(model: nn.Module) -> np.ndarray:
    return rotary_of(model).inv_freq.double().numpy()


def small_config(theta: float, head_dim: int, length: int) -> GatedLlamaConfig:
    """A config of a model that is nothing but its RoPE."""
    return GatedLlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


def check_rotation(rotary: nn.Module, expected: np.ndarray, attention_factor: float) -> None:
    """What the module computes: cosines and sines of all angles, times the attention factor."""
    positions = np.array([0, 1, 7, 100, 2000])
    cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
    angles = np.tile(positions[:, None] * expected, 2)
    tolerance = attention_factor * (1e-6 + 1e-6 * positions[:, None])  # float32's angles err in proportion
    assert (np.abs(cos[0].double().numpy() - attention_factor * np.cos(angles)) < tolerance).all()
    assert (np.abs(sin[0].double().numpy() - attention_factor * np.sin(angles)) < tolerance).all()


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
    LlamaConfig(
        hidden_size=8,
        num_attention_heads=1,
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
    found = model.config.rope_parameters
    assert found == {"rope_type": "default", "rope_theta": pytest.approx(expected, rel=1e-9)}
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


def config_of(fields: dict[str, Any], through_llama: bool) -> PreTrainedConfig:
    """A gated config of the fields that a config.json may have."""
    fields = SIZES | fields
    if through_llama:
        return GatedLlamaConfig.from_source_config(LlamaConfig.from_dict(fields))
    return GatedLlamaConfig.from_dict(fields)


def yarn_of(length: int, original: int, **fields: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 5e5, "factor": length / original} | fields


SCALED: dict[str, tuple[dict[str, Any], int | None]] = {
    # and the length that the RoPE under the scaling was made for, if the config says so
    "yarn": ({"rope_parameters": yarn_of(256, 64, original_max_position_embeddings=64)}, 64),
    "llama3": ({"rope_parameters": LLAMA3_ROPE}, 64),
    "linear": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, None),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}}, 256),
    "longrope": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 5e5,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 128,
            }
        },
        128,
    ),
    "yarn, old spelling": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        64,
    ),
    "linear, old spelling": ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
    "dynamic, old spelling": ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 256),
    "llama3, old spelling": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"},
        },
        64,
    ),
}


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
        given = {}
        if original is None:
            with pytest.raises(ValueError, match=f"'{name}' does not say .*original_max_position_embeddings has to be"):
                extend_context(config, 1024, method, replace_scaling=True)
            assert config.to_dict() == before
            given = {"original_max_position_embeddings": 128}
        start = original or 128
        extend_context(config, 1024, method, replace_scaling=True, **given)
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


@pytest.mark.parametrize("case", [case for case in SCALED if "," not in case])
def test_a_replaced_scaling_is_gone_from_a_loaded_model(case: str) -> None:
    fields, original = SCALED[case]
    model = GatedLlamaForCausalLM(config_of(fields, False))
    before = frequencies(model)
    done = extend_context(model, 1024, "yarn", original_max_position_embeddings=original or 128, replace_scaling=True)
    factor = 1024 / (original or 128)
    expected = yarn_frequencies(5e5, HEAD_DIM, factor, original or 128)
    # Longer than the original length: neither dynamic scaling nor longrope may come back.
    rotary_of(model)(torch.zeros(1), torch.arange(512)[None])
    assert relative_difference(frequencies(model), expected) < 1e-6
    check_rotation(rotary_of(model), expected, 0.1 * math.log(factor) + 1)
    done.undo()
    assert (frequencies(model) == before).all()
    assert rotary_of(model).rope_type == case


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
    "zero": ({"length": 0}, ["length=0 "]),
    "negative": ({"length": -1024}, ["length=-1024 "]),
    "a bool": ({"length": True}, ["length=True is no number of tokens"]),
    "a float": ({"length": 1024.0}, ["length=1024.0 "]),
    "a string": ({"length": "1024"}, ["length='1024' "]),
    "zero, yarn": ({"length": 0, "method": "yarn"}, ["length=0 "]),
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
    "method": ({"length": 1024, "method": "ntk"}, ["method='ntk'", "'rope_base'", "'yarn'"]),
    "original zero": ({"length": 1024, "original_max_position_embeddings": 0}, ["original_max_position_embeddings=0 "]),
    "original a bool": (
        {"length": 1024, "original_max_position_embeddings": True},
        ["original_max_position_embeddings=True "],
    ),
    "original a float": (
        {"length": 1024, "method": "yarn", "original_max_position_embeddings": 128.0},
        ["original_max_position_embeddings=128.0 "],
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


def any_model(kind: str) -> PreTrainedModel:
    """A small model for 32 tokens."""
    if kind == "LlamaForCausalLM":
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 32})).eval()
        randomize(model)
        return model
    classes = {
        "GatedLlamaForCausalLM": GatedLlamaForCausalLM,
        "GatedLlamaForSequenceClassification": GatedLlamaForSequenceClassification,
        "GatedLlamaModel": GatedLlamaModel,
    }
    model = gated_model("headwise", classes[kind], max_position_embeddings=32)
    randomize(model)
    return model


MODELS = ["LlamaForCausalLM", "GatedLlamaForCausalLM", "GatedLlamaForSequenceClassification", "GatedLlamaModel"]
EXTENSIONS: dict[str, dict[str, Any]] = {
    "rule": {"length": 256},
    "rope_base": {"length": 128, "rope_theta": 1e6},
    "yarn": {"length": 128, "method": "yarn"},
}


@torch.no_grad()
def output_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens)[0]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits, which weights elsewhere in memory may move."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "extension"),
    [(kind, extension) for kind in MODELS for extension in EXTENSIONS if "Causal" in kind or extension == "yarn"],
)
def test_a_loaded_model_is_extended_at_once_and_back(
    kind: str, extension: str, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = any_model(kind)
    config, before, rotary = model.config, model.config.to_dict(), rotary_of(model)
    plain, buffers = output_of(model, tokens), {name: value.clone() for name, value in rotary.named_buffers()}
    done = extend_context(model, **EXTENSIONS[extension])
    assert rotary_of(model) is rotary
    assert model.config is config
    extended = output_of(model, tokens)
    assert (extended - plain).abs().max() > 1e-2

    config.save_pretrained(tmp_path / "config")
    built = type(model)(type(config).from_pretrained(tmp_path / "config")).eval()
    built.load_state_dict(model.state_dict())
    assert_close(extended, output_of(built, tokens))
    assert {module.config.max_position_embeddings for module in model.modules() if hasattr(module, "config")} == {
        EXTENSIONS[extension]["length"]
    }
    if extension == "yarn":
        model.save_pretrained(tmp_path / "model")
        assert_close(extended, output_of(type(model).from_pretrained(tmp_path / "model").eval(), tokens))

    done.undo()
    assert rotary_of(model) is rotary
    assert torch.equal(output_of(model, tokens), plain)
    assert all(torch.equal(value, buffers[name]) for name, value in rotary.named_buffers())
    assert without_saving(config.to_dict()) == without_saving(before)
    assert {module.config.max_position_embeddings for module in model.modules() if hasattr(module, "config")} == {32}


def without_saving(fields: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that save_pretrained fills in."""
    return {name: value for name, value in fields.items() if name not in ("architectures", "auto_map", "dtype")}


def test_a_head_and_its_decoder_with_configs_of_their_own_are_both_extended(tokens: torch.Tensor) -> None:
    model = any_model("GatedLlamaForSequenceClassification")
    if model.config is model.model.config:
        other = GatedLlamaConfig.from_dict(model.config.to_dict())
        for module in model.model.modules():
            if hasattr(module, "config"):
                module.config = other
    assert model.config is not model.model.config
    plain = output_of(model, tokens)
    done = extend_context(model, 128, "yarn")
    for config in (model.config, model.model.config):
        assert (config.max_position_embeddings, config.rope_parameters["factor"]) == (128, 4)
    assert model.config.rope_parameters is not model.model.config.rope_parameters
    assert (output_of(model, tokens) - plain).abs().max() > 1e-3
    done.undo()
    for config in (model.config, model.model.config):
        assert (config.max_position_embeddings, config.rope_parameters["rope_type"]) == (32, "default")
    assert torch.equal(output_of(model, tokens), plain)


@pytest.mark.parametrize("method", ["rope_base", "yarn"])
def test_a_model_with_an_adapter(method: str, tokens: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    adapter = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(any_model("GatedLlamaForCausalLM"), peft.LoraConfig(**adapter)).eval()
    plain, rotary = output_of(model, tokens), rotary_of(model)
    done = extend_context(model, 128, method)
    assert rotary_of(model) is rotary
    extended = output_of(model, tokens)
    assert (extended - plain).abs().max() > 1e-2
    config = model.get_base_model().config
    assert config.max_position_embeddings == 128
    fresh = GatedLlamaForCausalLM(GatedLlamaConfig.from_dict(config.to_dict())).eval()
    built = peft.get_peft_model(fresh, peft.LoraConfig(**adapter)).eval()
    built.load_state_dict(model.state_dict())
    assert_close(extended, output_of(built, tokens))
    done.undo()
    assert torch.equal(output_of(model, tokens), plain)


@pytest.mark.parametrize("method", ["rope_base", "yarn"])
def test_frequencies_stay_float32_in_a_bfloat16_model(method: str, tokens: torch.Tensor) -> None:
    model = any_model("GatedLlamaForCausalLM").to(torch.bfloat16)
    plain, dtype = output_of(model, tokens), rotary_of(model).inv_freq.dtype
    assert dtype == torch.bfloat16  # .to() rounds them, which an extension must not build upon
    done = extend_context(model, 128, method)
    assert {buffer.dtype for buffer in rotary_of(model).buffers()} == {torch.float32}
    theta = model.config.rope_parameters["rope_theta"]
    expected = yarn_frequencies(1e4, HEAD_DIM, 4, 32) if method == "yarn" else plain_frequencies(theta, HEAD_DIM)
    assert relative_difference(frequencies(model), expected) < 1e-6
    assert output_of(model, tokens).dtype == torch.bfloat16
    done.undo()
    assert torch.equal(output_of(model, tokens), plain)


def test_frequencies_stay_on_their_device() -> None:
    """Of the meta device, as others are not everywhere."""
    with torch.device("meta"):
        model = GatedLlamaForCausalLM(small_config(1e4, 64, 4096))
    done = extend_context(model, 8192, "yarn")
    assert {buffer.device.type for buffer in rotary_of(model).buffers()} == {"meta"}
    assert rotary_of(model).attention_scaling == pytest.approx(0.1 * math.log(2) + 1)
    done.undo()
    assert {buffer.device.type for buffer in rotary_of(model).buffers()} == {"meta"}
    assert rotary_of(model).attention_scaling == 1


def test_frequencies_are_not_saved_and_have_no_names_in_the_state_dict() -> None:
    model = any_model("GatedLlamaForCausalLM")
    names = set(model.state_dict())
    extend_context(model, 128, "yarn")
    assert set(model.state_dict()) == names


def test_extensions_are_undone_in_their_order(tokens: torch.Tensor) -> None:
    model = any_model("GatedLlamaForCausalLM")
    plain = output_of(model, tokens)
    first = extend_context(model, 64, rope_theta=1e6)
    middle = output_of(model, tokens)
    second = extend_context(model, 256, "yarn")
    last, fields = output_of(model, tokens), model.config.to_dict()
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.config.rope_parameters["factor"] == 4
    with pytest.raises(ValueError, match=r"max_position_embeddings=256.*undo later extensions first"):
        first.undo()
    assert torch.equal(output_of(model, tokens), last)
    assert model.config.to_dict() == fields
    second.undo()
    assert torch.equal(output_of(model, tokens), middle)
    with pytest.raises(ValueError, match=r"max_position_embeddings=64.*nothing to undo"):
        second.undo()
    first.undo()
    assert torch.equal(output_of(model, tokens), plain)


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


@pytest.mark.parametrize("method", ["rope_base", "yarn"])
@torch.no_grad()
def test_a_cache_from_before_is_invalid(method: str, tokens: torch.Tensor) -> None:
    model = any_model("GatedLlamaForCausalLM")
    old = model(tokens[:, :20], use_cache=True).past_key_values
    extend_context(model, 128, method)
    expected = model(tokens).logits[:, 20:]
    new = model(tokens[:, :20], use_cache=True).past_key_values
    assert_close(model(tokens[:, 20:], past_key_values=new).logits, expected)
    assert (model(tokens[:, 20:], past_key_values=old).logits - expected).abs().max() > 1e-2


def test_describe_context() -> None:
    config = LlamaConfig(**SIZES)
    assert describe_context(config) == "256 tokens, rope_theta 10,000"
    extend_context(config, 4096, rope_theta=1e6)
    assert describe_context(config) == "4,096 tokens, rope_theta 1,000,000"
    extend_context(config, 32768, "yarn")
    assert describe_context(config) == "32,768 tokens, rope_theta 1,000,000, yarn, factor 8, from 4,096"


def test_partial_rotation_is_kept() -> None:
    """Of a family that has it: the rule and the frequencies are of the channels that turn."""
    glm = pytest.importorskip("transformers.models.glm.modeling_glm")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = glm.GlmModel(
        glm.GlmConfig(
            **sizes,
            vocab_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            pad_token_id=0,
            max_position_embeddings=256,
            rope_parameters=rope,
        )
    )
    extend_context(model, 1024)
    theta = 1e4 * 4 ** (8 / 6)
    assert model.config.rope_parameters == rope | {"rope_theta": pytest.approx(theta)}
    assert relative_difference(model.rotary_emb.inv_freq.double().numpy(), plain_frequencies(theta, 8)) < 1e-6


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
    with pytest.raises(ValueError, match="length=1000"):
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
    with pytest.raises(ValueError, match=f"{name}=.* is no number to compute with"):
        extend_context(LlamaConfig(**SIZES), 1024, method, **{name: value})

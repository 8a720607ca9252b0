"""Loaded models are extended at once, compute what models built from the config do, and are undone bit for bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_gated import (
    GatedLlamaConfig,
    GatedLlamaForCausalLM,
    GatedLlamaForSequenceClassification,
    GatedLlamaModel,
)
from modeling_gated.configuration import extend_context
from tests.helpers.cache_by_version import cache_of, with_cache
from tests.helpers.close_tensors import assert_close
from tests.helpers.gated_models import gated_model
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
)
from tests.helpers.source_models import SIZES, randomize
from tests.helpers.tiny_configs import tiny_llama


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


@pytest.mark.parametrize("method", ["rope_base", "yarn"])
@torch.no_grad()
def test_a_cache_from_before_is_invalid(method: str, tokens: torch.Tensor) -> None:
    model = any_model("GatedLlamaForCausalLM")
    old = cache_of(model(tokens[:, :20], use_cache=True))
    extend_context(model, 128, method)
    expected = model(tokens).logits[:, 20:]
    new = cache_of(model(tokens[:, :20], use_cache=True))
    assert_close(model(tokens[:, 20:], **with_cache(new)).logits, expected)
    assert (model(tokens[:, 20:], **with_cache(old)).logits - expected).abs().max() > 1e-2


def test_partial_rotation_is_kept() -> None:
    """Of a family that has it: the rule and the frequencies are of the channels that turn."""
    glm = pytest.importorskip("transformers.models.glm.modeling_glm")
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = tiny_llama(glm.GlmConfig, head_dim=16, pad_token_id=0, max_position_embeddings=256, rope_parameters=rope)
    model = glm.GlmModel(config)
    extend_context(model, 1024)
    theta = 1e4 * 4 ** (8 / 6)
    assert model.config.rope_parameters == rope | {"rope_theta": pytest.approx(theta)}
    assert relative_difference(model.rotary_emb.inv_freq.double().numpy(), plain_frequencies(theta, 8)) < 1e-6

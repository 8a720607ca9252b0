"""A gated model is quantized as it is loaded, its gates left in full precision by MODULES_TO_NOT_CONVERT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from modeling_gated import MODULES_TO_NOT_CONVERT
from modeling_gated.gate_names import is_gate
from modeling_gated.modeling_gated_llama import GatedLlamaGate
from tests.helpers.gated_models import gated_model


# Blocks of 64 weights have to fit into a projection.
SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}


def torchao(name: str) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)(), modules_to_not_convert=MODULES_TO_NOT_CONVERT)


def bitsandbytes(**how: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**how, llm_int8_skip_modules=MODULES_TO_NOT_CONVERT)


SCHEMES: dict[str, Callable[[], Any]] = {
    "torchao, int8 weights": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao, int8 weights and activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes, int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes, nf4": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
}


def is_quantized(linear: nn.Module) -> bool:
    return type(linear.weight) is not nn.Parameter or linear.weight.dtype in (torch.int8, torch.uint8)


def check_parts(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """All projections are quantized, gates and the output layer are what they were."""
    quantized = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_quantized(module)
    }
    linears = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    kept = {name for name, module in original.named_modules() if isinstance(module, GatedLlamaGate)} | {"lm_head"}
    assert quantized == linears - kept
    assert not model.get_output_embeddings().weight.is_meta
    expected = {name: value for name, value in original.named_parameters() if is_gate(name)}
    actual = {name: value for name, value in model.named_parameters() if is_gate(name)}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], value)


@pytest.mark.parametrize("variant", ["headwise", "elementwise"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_quantized_model_runs_and_is_saved(scheme: str, variant: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    """Its logits are near the original's, it generates, and what is saved of it loads as the same."""
    original = gated_model(variant, **SIZES)
    original.save_pretrained(tmp_path / "model")
    config = SCHEMES[scheme]()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config, dtype=torch.float32)
    check_parts(model, original)
    # Before its first pass, in which bitsandbytes changes nf4 weights on CPUs with bfloat16 products; of Llama, too.
    model.save_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        expected, actual = original(tokens).logits, model(tokens).logits.float()
    assert (actual - expected).norm() / expected.norm() < (0.25 if "nf4" in scheme else 0.05)
    assert not torch.equal(actual, expected)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 36)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    check_parts(again, original)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits.float(), actual, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheme", ["torchao, int8 weights", "bitsandbytes, int8"])
def test_gates_at_all_positions_are_left_alone(scheme: str, tmp_path: Path) -> None:
    config = SCHEMES[scheme]()
    positions = {"gate_position": ["G1", "G2", "G3", "G4", "G5"], "gate_granularity": "elementwise"}
    original = gated_model("headwise", **SIZES, **positions)
    original.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    check_parts(model, original)

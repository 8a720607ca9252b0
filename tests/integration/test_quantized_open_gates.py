"""Quantization of an open gate's weight where nobody leaves the gates out: rows of 2**-60, and rows of 0."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.integrations import finegrained_fp8

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.configuration import OPEN_GATE_WEIGHT
from tests.helpers.gated_models import SIZES


ROWS, COLUMNS = 16, 128


def open_weight(value: float) -> torch.Tensor:
    return torch.full((ROWS, COLUMNS), value)


def per_row_float8(least: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One scale a row. torchao has no lower bound for the row's largest number, FBGEMM has 1e-12."""

    def quantized(weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=least) / torch.finfo(torch.float8_e4m3fn).max
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale

    return quantized


def float8_in_blocks(scale_format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Transformers' fine-grained fp8."""

    def quantized(weight: torch.Tensor) -> torch.Tensor:
        config = SimpleNamespace(weight_block_size=(8, 64), scale_fmt=scale_format)
        operation = finegrained_fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
        converted = operation.convert({"g_proj.weight": weight})
        scale = converted["g_proj.weight_scale_inv"].float().repeat_interleave(8, 0).repeat_interleave(64, 1)
        return converted["g_proj.weight"].float() * scale

    return quantized


def compressed_tensors(kind: str, bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def quantized(weight: torch.Tensor) -> torch.Tensor:
        quantization = pytest.importorskip("compressed_tensors.quantization")
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        arguments = quantization.QuantizationArgs(num_bits=bits, type=kind, strategy="channel", symmetric=True)
        scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), arguments)
        return fake_quantize(weight, scale, zero, arguments)

    return quantized


def bitsandbytes_4bit(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def quantized(weight: torch.Tensor) -> torch.Tensor:
        functional = pytest.importorskip("bitsandbytes.functional")
        return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type=kind))

    return quantized


def bitsandbytes_int8(weight: torch.Tensor) -> torch.Tensor:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(COLUMNS, ROWS, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")(torch.eye(COLUMNS, dtype=torch.bfloat16)).T


def torchao(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def quantized(weight: torch.Tensor) -> torch.Tensor:
        quantization = pytest.importorskip("torchao.quantization")
        layer = nn.Linear(COLUMNS, ROWS, bias=False)
        layer.weight = nn.Parameter(weight)
        layer = nn.Sequential(layer).bfloat16()
        quantization.quantize_(layer, getattr(quantization, name)())
        return layer(torch.eye(COLUMNS, dtype=torch.bfloat16)).T

    return quantized


SCHEMES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bitsandbytes int8": bitsandbytes_int8,
    "bitsandbytes nf4": bitsandbytes_4bit("nf4"),
    "bitsandbytes fp4": bitsandbytes_4bit("fp4"),
    "compressed-tensors int8": compressed_tensors("int", 8),
    "compressed-tensors float8": compressed_tensors("float", 8),
    "compressed-tensors int4": compressed_tensors("int", 4),
    "per-row float8": per_row_float8(0.0),
    "fbgemm float8": per_row_float8(1e-12),
    "fine-grained float8": float8_in_blocks("float"),
    "fine-grained float8, scales that are powers of 2": float8_in_blocks("ue8m0"),
    "torchao int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao int8 weights and activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8 weights": torchao("Float8WeightOnlyConfig"),
}
NAN_AT_ZERO = {"per-row float8", "torchao float8 weights"}


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_an_open_gate_stays_open(scheme: str) -> None:
    actual = SCHEMES[scheme](open_weight(OPEN_GATE_WEIGHT))
    assert actual.isfinite().all()
    assert actual.abs().max() < 2.0**-50


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_where_a_row_of_zero_gives_nan(scheme: str) -> None:
    """Float8 alone, which is why open gates are not 0."""
    assert SCHEMES[scheme](open_weight(0.0)).isnan().any() == (scheme in NAN_AT_ZERO)


def torchao_gates(name: str) -> Callable[[nn.Module], None]:
    def quantize(attention: nn.Module) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        only_gates = lambda module, path: path.endswith("g_proj")  # noqa: E731
        quantization.quantize_(attention, getattr(quantization, name)(), filter_fn=only_gates)

    return quantize


def bitsandbytes_gates(attention: nn.Module) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    gate = attention.g_proj
    quantized = bitsandbytes.nn.Linear4bit(gate.in_features, gate.out_features, compute_dtype=torch.float32)
    quantized.load_state_dict(gate.state_dict())
    attention.g_proj = quantized.to("cpu")


# The second entry says whether the scheme rounds 2**-60 to 0, which DoRA cannot train.
QUANTIZED_GATES: dict[str, tuple[Callable[[nn.Module], None], bool]] = {
    "bitsandbytes nf4": (bitsandbytes_gates, False),
    "torchao int8 weights": (torchao_gates("Int8WeightOnlyConfig"), True),
    "torchao float8 weights": (torchao_gates("Float8WeightOnlyConfig"), False),
}


@pytest.mark.parametrize("scheme", list(QUANTIZED_GATES))
def test_adapters_on_quantized_gates(scheme: str) -> None:
    quantize, is_rounded_to_0 = QUANTIZED_GATES[scheme]

    def adapted(**fields: Any) -> nn.Module:
        torch.manual_seed(0)
        model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES | {"hidden_size": 96}))
        for layer in model.model.layers:
            quantize(layer.self_attn)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "g_proj"], **fields))

    tokens = torch.arange(1, 41)[None]
    for fields in ({}, {"use_dora": True}):
        if fields and is_rounded_to_0:
            with pytest.raises(ValueError, match="a weight that is 0, which gives NaN"):
                adapted(**fields)
            continue
        model = adapted(**fields)
        model(tokens, labels=tokens).loss.backward()
        actual = [parameter.grad for name, parameter in model.named_parameters() if "g_proj.lora_B" in name]
        assert len(actual) == SIZES["num_hidden_layers"]
        assert all(gradient.isfinite().all() and gradient.any() for gradient in actual)
    with pytest.raises(ValueError, match="late or never"):
        adapted(init_lora_weights="pissa")

"""Quantization of an open gate's weight where nobody leaves the gates out: rows of 2**-60, and rows of 0."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from modeling_gated.configuration import OPEN_GATE_WEIGHT


ROWS, COLUMNS = 16, 128


def open_weight(value: float) -> torch.Tensor:
    return torch.full((ROWS, COLUMNS), value)


def per_row_float8(weight: torch.Tensor) -> torch.Tensor:
    """One scale a row without a lower bound, as torchao's float8 has it."""
    scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


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
    "per-row float8": per_row_float8,
    "torchao int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao int8 weights and activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8 weights": torchao("Float8WeightOnlyConfig"),
}
NAN_AT_ZERO = {"per-row float8", "torchao float8 weights"}


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_an_open_gate_stays_open(scheme: str) -> None:
    found = SCHEMES[scheme](open_weight(OPEN_GATE_WEIGHT))
    assert found.isfinite().all()
    assert found.abs().max() < 2.0**-50


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_where_a_row_of_zero_gives_nan(scheme: str) -> None:
    """Float8 alone, which is why open gates are not 0."""
    assert SCHEMES[scheme](open_weight(0.0)).isnan().any() == (scheme in NAN_AT_ZERO)

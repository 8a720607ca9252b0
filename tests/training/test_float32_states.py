"""An optimizer of bfloat16 weights that works in float32."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from modeling_gated.training import keep_float32_states


Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MAKERS: dict[str, Maker] = {
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, foreach=True),
    "AdamW, one by one": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, foreach=False),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True),
    "AMSGrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=0.01),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}
SHAPES = [(7, 5), (5,), (3, 2, 4)]


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def take_steps(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range, dtype: torch.dtype
) -> None:
    """With gradients that are the same for each step, numbers of `dtype`, and given in each parameter's own."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(MAKERS))
def test_weights_are_the_rounded_ones_of_float32(name: str, dtype: torch.dtype) -> None:
    actual, expected = weights(dtype), [nn.Parameter(weight.detach().float()) for weight in weights(dtype)]
    optimizer, plain = keep_float32_states(MAKERS[name](actual)), MAKERS[name](expected)
    for step in range(20):
        take_steps(optimizer, actual, range(step, step + 1), dtype)
        take_steps(plain, expected, range(step, step + 1), dtype)
        for updated, reference in zip(actual, expected, strict=True):
            assert updated.dtype == dtype
            assert torch.equal(updated, reference.to(dtype))
    rounded = weights(dtype)
    take_steps(MAKERS[name](rounded), rounded, range(20), dtype)
    assert not all(torch.equal(updated, other) for updated, other in zip(actual, rounded, strict=True))


@pytest.mark.parametrize("kept", [True, False])
def test_tiny_updates_add_up(kept: bool) -> None:
    bias = nn.Parameter(torch.tensor([1.734375], dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([bias], lr=1e-5, weight_decay=0.0)
    if kept:
        optimizer = keep_float32_states(optimizer)
    for _ in range(1000):
        bias.grad = torch.ones_like(bias)
        optimizer.step()
    assert bias.item() == (1.7265625 if kept else 1.734375)


def test_the_same_optimizer_is_returned() -> None:
    optimizer = torch.optim.AdamW(weights(torch.bfloat16))
    assert keep_float32_states(optimizer) is optimizer


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_loaded_optimizer_goes_on_as_if_never_saved(name: str) -> None:
    parameters = weights(torch.bfloat16)
    optimizer = keep_float32_states(MAKERS[name](parameters))
    take_steps(optimizer, parameters, range(10), torch.bfloat16)
    again = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    saved = copied(optimizer.state_dict())
    resumed = keep_float32_states(MAKERS[name](again))
    resumed.load_state_dict(saved)
    for parameter in again:
        floating = [value for value in resumed.state[parameter].values() if torch.is_tensor(value)]
        assert floating
        assert {value.dtype for value in floating} == {torch.float32}
        assert any(value.shape == parameter.shape for value in floating)
    take_steps(resumed, again, range(10, 20), torch.bfloat16)
    assert all(state[key].data_ptr() != value.data_ptr() for state, key, value in tensors_of(resumed, saved))
    take_steps(optimizer, parameters, range(10, 20), torch.bfloat16)
    for actual, expected in zip(again, parameters, strict=True):
        assert torch.equal(actual, expected)
        assert resumed.state[actual].keys() == optimizer.state[expected].keys()
        for key, value in optimizer.state[expected].items():
            if torch.is_tensor(value):
                assert value.dtype == torch.float32
                assert torch.equal(resumed.state[actual][key], value), key


def tensors_of(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> list[tuple[dict, str, torch.Tensor]]:
    states = list(optimizer.state.values())
    return [
        (states[number], key, value)
        for number, state in saved["state"].items()
        for key, value in state.items()
        if torch.is_tensor(value)
    ]


def test_loading_twice_is_loading_the_last() -> None:
    parameters = weights(torch.bfloat16)
    optimizer = keep_float32_states(MAKERS["AdamW, foreach"](parameters))
    take_steps(optimizer, parameters, range(3), torch.bfloat16)
    first = copied(optimizer.state_dict())
    take_steps(optimizer, parameters, range(3, 6), torch.bfloat16)
    second = copied(optimizer.state_dict())
    optimizer.load_state_dict(first)
    optimizer.load_state_dict(second)
    for number, parameter in enumerate(parameters):
        for key, value in second["state"][number].items():
            assert torch.equal(optimizer.state[parameter][key], value)


def test_float32_weights_are_updated_as_ever() -> None:
    mixed = [*weights(torch.bfloat16)[:1], *weights(torch.float32)[1:]]
    plain = weights(torch.float32)[1:]
    optimizer, reference = keep_float32_states(torch.optim.AdamW(mixed)), torch.optim.AdamW(plain)
    for _ in range(5):
        for weight, other in zip(mixed[1:], plain, strict=True):
            weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(other)
        mixed[0].grad = torch.ones_like(mixed[0])
        optimizer.step()
        reference.step()
    for weight, other in zip(mixed[1:], plain, strict=True):
        assert torch.equal(weight, other)
        assert optimizer.state[weight].keys() == reference.state[other].keys()
    assert optimizer.state[mixed[0]].keys() > optimizer.state[mixed[1]].keys()


def test_gradients_are_left_as_they_were() -> None:
    parameters = weights(torch.bfloat16)
    optimizer = keep_float32_states(torch.optim.AdamW(parameters))
    gradients = [torch.randn(parameter.shape).bfloat16() for parameter in parameters]
    expected = [gradient.clone() for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter, gradient, value in zip(parameters, gradients, expected, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_a_weight_without_a_gradient_stays() -> None:
    parameters = weights(torch.bfloat16)
    before = parameters[1].detach().clone()
    optimizer = keep_float32_states(torch.optim.AdamW(parameters, weight_decay=0.5))
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1].dtype == torch.bfloat16
    assert parameters[1] not in optimizer.state


@pytest.mark.parametrize("by_keyword", [True, False])
def test_closures_are_refused(by_keyword: bool) -> None:
    parameters = weights(torch.bfloat16)
    optimizer = keep_float32_states(torch.optim.SGD(parameters, lr=1.0))
    parameters[0].grad = torch.ones_like(parameters[0])

    def closure() -> float:
        raise AssertionError("called")

    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert torch.equal(parameters[0], weights(torch.bfloat16)[0])
    optimizer.step(None)
    optimizer.step(closure=None)
    assert parameters[0].dtype == torch.bfloat16


def test_an_optimizer_that_took_steps_is_refused() -> None:
    parameters = weights(torch.bfloat16)
    optimizer = torch.optim.AdamW(parameters)
    take_steps(optimizer, parameters, range(1), torch.bfloat16)
    with pytest.raises(ValueError, match="AdamW has states already"):
        keep_float32_states(optimizer)


def test_wrapping_again_after_a_step_is_refused() -> None:
    parameters = weights(torch.bfloat16)
    optimizer = keep_float32_states(torch.optim.AdamW(parameters))
    take_steps(optimizer, parameters, range(1), torch.bfloat16)
    with pytest.raises(ValueError, match="AdamW has states already"):
        keep_float32_states(optimizer)

"""Optimizers whose states are float32 where the weights are not."""

from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor


AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)
MASTER = "master_weight"


def keep_float32_states(optimizer: AnyOptimizer) -> AnyOptimizer:
    """
    Make an optimizer of bfloat16 or float16 parameters work in float32: it updates float32 copies of them, its moments
    are float32, too, and the parameters are the copies, rounded.

    Without that an update smaller than half a unit in the last place is lost: a gate's bias of 1.734 moves in steps of
    0.0078. Float32 parameters are updated as ever. The copies are part of `optimizer.state_dict()`; they take 4 bytes
    for each parameter, the moments double, and during a step gradients are float32, too. Each step gives parameters new
    storage, so what holds views of them, such as CUDA graphs, can't be used; and what is written into a parameter
    between two steps is overwritten. Parameters that FSDP2 shards are refused: keep them in float32, and compute in
    bfloat16.

    Args:
        optimizer: any that makes its states in its first step (of torch's all but Adagrad), before that. It is changed
            in place. Its steps can't have a closure.

    Returns:
        The same optimizer.

    Raises:
        ValueError: if the optimizer has states already.
    """
    if optimizer.state:
        raise ValueError(f"{type(optimizer).__name__} has states already, in its parameters' dtypes")
    swapped: list[tuple[torch.nn.Parameter, torch.dtype, torch.Tensor]] = []
    loaded: list[dict[str, Any]] = []

    def to_float32(_: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(closure is not None for closure in (*args[1:], kwargs.get("closure"))):
            raise ValueError("an optimizer that keeps float32 states takes no closure")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dtype in (torch.bfloat16, torch.float16):
                    if isinstance(parameter, DTensor):
                        raise ValueError("float32 states of sharded parameters: keep the parameters in float32 instead")
                    gradient, dtype = parameter.grad, parameter.dtype
                    master = optimizer.state.get(parameter, {}).get(MASTER)
                    parameter.grad = None  # its dtype has to be the parameter's
                    parameter.data = parameter.data.float() if master is None else master
                    parameter.grad = gradient.float()
                    swapped.append((parameter, dtype, gradient))

    def back(*_: object) -> None:
        for parameter, dtype, gradient in swapped:
            optimizer.state[parameter][MASTER] = parameter.data
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.grad = gradient
        swapped.clear()

    def before_loading(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        loaded.append(state_dict)

    def after_loading(_: torch.optim.Optimizer) -> None:
        # Loading rounds floating-point states to their parameter's dtype.
        state_dict = loaded.pop()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key in optimizer.state[parameter] and torch.is_tensor(value) and value.dtype == torch.float32:
                    state = optimizer.state[parameter]
                    state[key] = value.to(state[key].device, copy=True)

    optimizer.register_step_pre_hook(to_float32)
    optimizer.register_step_post_hook(back)
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_post_hook(after_loading)
    return optimizer

"""Rounding a model to int8, as the plainest quantisation does, to see what its predictions lose."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_gated.errors import InspectionError
from modeling_gated.inspection.watching.inspecting import decoder_layers


@contextmanager
def int8_weights(model: PreTrainedModel) -> Iterator[None]:
    """
    Round the weights of the layers' projections to int8 and back inside the `with` block: symmetric, one scale for each
    of them, max |weight| / 127.

    Raises:
        InspectionError: if the layers have no `torch.nn.Linear`.
    """
    before = {module: module.weight.data for module in _projections(model)}
    try:
        for module, weight in before.items():
            module.weight.data = _rounded(weight)
        yield
    finally:
        for module, weight in before.items():
            module.weight.data = weight


@contextmanager
def int8_activations(model: PreTrainedModel) -> Iterator[None]:
    """
    Round what the layers give on, and the inputs of their projections, to int8 and back inside the `with` block:
    symmetric, one scale for a tensor of a forward pass, max |activation| / 127, which a massive one makes coarse.

    Raises:
        InspectionError: if the layers have no `torch.nn.Linear`.
    """

    def rounded_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return _rounded(arguments[0]), *arguments[1:]

    def rounded_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return _rounded(output) if isinstance(output, torch.Tensor) else (_rounded(output[0]), *output[1:])

    with ExitStack() as stack:
        for module in _projections(model):
            stack.callback(module.register_forward_pre_hook(rounded_input).remove)
        for layer in decoder_layers(model.get_decoder()):
            stack.callback(layer.register_forward_hook(rounded_output).remove)
        yield


def _projections(model: PreTrainedModel) -> list[nn.Linear]:
    layers = decoder_layers(model.get_decoder())
    projections = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    projections = [module for module in projections if module.weight.is_floating_point()]  # not what is packed already
    if not projections:
        raise InspectionError(f"{type(model).__name__}: its layers have no linear projections to round")
    return projections


def _rounded(values: torch.Tensor) -> torch.Tensor:
    scale = (values.abs().amax().float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return ((values.float() / scale).round() * scale).to(values.dtype)

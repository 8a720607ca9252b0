"""MLP neurons that write massive activations into the hidden states, called writers, and their removal."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_gated.inspection import MassiveActivations, inspecting
from modeling_gated.inspection.watching.inspecting import decoder_layers, input_device


# Sun et al., arXiv 2402.17762, Section 2: a massive activation is above 100 and about 1,000 times the median.
_MASSIVE, _TIMES_MEDIAN = 100, 1000


@dataclass(frozen=True)
class Writer:
    """
    MLP neuron that writes massive activations.

    Attributes:
        layer: index of the layer.
        neuron: index of the neuron, a column of `down_proj`.
        channel: channel of the hidden state that the neuron adds most to.
        value: largest magnitude that the neuron adds to this channel.
    """

    layer: int
    neuron: int
    channel: int
    value: float


@torch.no_grad()
def find_writers(model: PreTrainedModel, windows: Iterable[torch.Tensor], share: float = 0.1) -> list[Writer]:
    """
    Find the neurons that write a model's massive activations, including neurons that subtract them again.

    An activation is massive above 100 and 1,000 times the median (arXiv 2402.17762, Section 2).

    Args:
        model: causal language model of this package, in evaluation mode.
        windows: token ids [batch, tokens].
        share: threshold as a share of the largest |hidden state|. Neurons that add more to a channel are returned.

    Returns:
        The neurons, largest value first. Empty if no activation is massive.
    """
    layers: Any = decoder_layers(model.get_decoder())
    maxima: dict[int, torch.Tensor] = {}
    meter = MassiveActivations(top=1)

    def watch(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            largest = arguments[0].abs().flatten(0, -2).amax(0).float()
            maxima[number] = torch.maximum(maxima.get(number, largest), largest)

        return hook

    with ExitStack() as stack:
        stack.enter_context(inspecting(model, meter))
        for number, layer in enumerate(layers):
            stack.callback(layer.mlp.down_proj.register_forward_pre_hook(watch(number)).remove)
        for window in windows:
            model.base_model(window.to(input_device(model)), use_cache=False)
    hidden = meter.result().layers
    largest = max(layer.maximum for layer in hidden)
    median = sorted(layer.median for layer in hidden)[len(hidden) // 2]
    if largest < _MASSIVE or largest < _TIMES_MEDIAN * median:
        return []
    writers = []
    for number, layer in enumerate(layers):
        weights, channels = layer.mlp.down_proj.weight.abs().float().max(0)
        added = maxima[number] * weights
        writers += [
            Writer(number, neuron, int(channels[neuron]), added[neuron].item())
            for neuron in (added > share * largest).nonzero().flatten().tolist()
        ]
    return sorted(writers, key=lambda writer: -writer.value)


@torch.no_grad()
def remove_writers(model: PreTrainedModel, writers: Iterable[Writer]) -> None:
    """Remove neurons from a model in place: their columns of `down_proj` become 0."""
    layers: Any = decoder_layers(model.get_decoder())
    for writer in writers:
        layers[writer.layer].mlp.down_proj.weight[:, writer.neuron] = 0

"""Training of an attention block on the source model's outputs, before the next layer is edited."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from modeling_gated.gate_names import is_gate
from modeling_gated.training import keep_float32_states

from .layer_states import LayerStates
from .sinks import LayerSinks


@dataclass(frozen=True)
class Refinement:
    """
    Training of an attention block with AdamW.

    The loss is ||output - expected||² / mean ||expected||², plus `sink_weight` times the attention to sinks. Learning
    rates fall along a cosine.

    Attributes:
        epochs: number of passes over the windows.
        learning_rate: learning rate of attention projections.
        gate_factor: learning rate of gates, as a multiple of `learning_rate`.
        sink_weight: weight of attention to sinks.
        rows: number of queries per batch, drawn at random, whose attention to sinks is measured.
        seed: random seed of the order of windows and of queries.
        trains_gates: train gates too.
    """

    epochs: int
    learning_rate: float = 1e-3
    gate_factor: float = 3.0
    sink_weight: float = 1.0
    rows: int = 64
    seed: int = 0
    trains_gates: bool = True

    def __call__(self, edited: LayerStates, sinks: LayerSinks) -> None:
        """Train the attention block of a layer. Its parameters are frozen before and after."""
        attention = edited.layer.self_attn
        gates = [parameter for name, parameter in attention.named_parameters() if self.trains_gates and is_gate(name)]
        projections = [parameter for name, parameter in attention.named_parameters() if not is_gate(name)]
        groups = [{"params": gates, "factor": self.gate_factor}, {"params": projections, "factor": 1.0}]
        optimizer = torch.optim.AdamW(groups, self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        if any(parameter.dtype != torch.float32 for parameter in gates + projections):  # small updates would round to 0
            keep_float32_states(optimizer)
        generator = random.Random(self.seed * 1000 + edited.number)
        scale = sum(output.square().sum().item() for output in sinks.outputs)
        scale /= sum(output.shape[:2].numel() for output in sinks.outputs)
        steps = self.epochs * len(edited)
        order: list[int] = []
        _train(gates + projections, True)
        for step in range(steps):
            order = order or generator.sample(range(len(edited)), len(edited))
            batch = order.pop()
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * self.learning_rate * _decay(step, steps)
            with torch.enable_grad():
                self._loss(edited, sinks, batch, scale, generator).backward()
            nn.utils.clip_grad_norm_(gates + projections, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        _train(gates + projections, False)

    def _loss(
        self, edited: LayerStates, sinks: LayerSinks, batch: int, scale: float, generator: random.Random
    ) -> torch.Tensor:
        hidden_states, expected, tokens = edited.input(batch), sinks.outputs[batch], sinks.tokens[batch]
        output, inputs = edited.attend(hidden_states)
        lost = (output.float() - expected.to(output.device)).square().sum(-1).mean() / scale
        length = tokens.shape[1]
        rows = torch.tensor(generator.sample(range(length), min(self.rows, length)), device=output.device)
        return lost + self.sink_weight * inputs.to_sinks(tokens.to(output.device), rows).sum(-1).mean()


def _decay(step: int, steps: int) -> float:
    """Return the factor of the learning rate: 5 steps of warmup, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / 5) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


def _train(parameters: Iterable[nn.Parameter], wanted: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(wanted)

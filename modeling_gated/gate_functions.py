# Copyright 2026 The GatedLlama authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Activations of gates, and gates' application with no more kept for the backward pass than it needs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def with_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a dtype. In decoding, `to` takes long even where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def non_sparse_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """0.5 + 0.5 sigmoid(x), between 0.5 and 1: a gate that cannot close (arXiv 2505.06708, Section 4.2)."""
    return 0.5 + 0.5 * torch.sigmoid(x)


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def sigmoid_slope(x: torch.Tensor) -> torch.Tensor:
    # Not s - s², of which nothing would be left where s is nearly 1.
    return torch.sigmoid(x) * torch.sigmoid(-x)


# Functions, not modules, whose calls take longer.
GATE_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": non_sparse_sigmoid,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "linear": identity,
}
# Their derivatives, for a backward pass that has no activations to go by.
GATE_SLOPES: dict[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]] = {
    torch.sigmoid: sigmoid_slope,
    non_sparse_sigmoid: lambda x: 0.5 * sigmoid_slope(x),
    nn.functional.silu: lambda x: torch.sigmoid(x) + x * sigmoid_slope(x),
    torch.tanh: lambda x: 1 - torch.tanh(x).square(),
    torch.relu: lambda x: (x > 0).to(x.dtype),
    identity: torch.ones_like,
}


class GatedStates(torch.autograd.Function):
    """
    States with the gates that an attention block makes of logits. For the backward pass it keeps the logits, of which
    it makes the gates again, and of gates that multiply the states, too. Of sigmoid gates autograd would keep twice as
    much beside the states, the activations and the gates, and in bfloat16, as activations are float32, three times.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(states: torch.Tensor, logits: torch.Tensor, attention: Any) -> torch.Tensor:
        """
        Args:
            states: [batch, seq, heads, channels].
            logits: [batch, seq, gates], or [1, gates].
            attention: a `GatedLlamaAttention`.
        """
        return attention.with_gates(states, attention.gate_values(logits))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        states, logits, ctx.attention = inputs
        ctx.save_for_backward(None if ctx.attention.is_additive else states, logits)
        ctx.save_for_forward(states, logits)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, logits = ctx.saved_tensors
        attention: Any = ctx.attention
        of_states = of_logits = None
        if ctx.needs_input_grad[0]:
            is_additive = attention.is_additive
            of_states = gradient if is_additive else attention.with_gates(gradient, attention.gate_values(logits))
        if ctx.needs_input_grad[1]:
            of_gates = gradient if attention.is_additive else gradient * states
            of_gates = of_gates.sum_to_size(attention.gates_of_heads(logits, gradient).shape).reshape(logits.shape)
            of_logits = with_dtype(of_gates.float() * _slopes(attention, logits), logits.dtype)
        return of_states, of_logits, None

    @staticmethod
    def jvp(ctx: Any, of_states: torch.Tensor, of_logits: torch.Tensor, _: None) -> torch.Tensor:
        states, logits = ctx.saved_tensors
        attention: Any = ctx.attention
        of_gates = of_logits * _slopes(attention, logits)
        if attention.is_additive:
            return attention.with_gates(of_states, of_gates)
        changed = attention.with_gates(of_states, attention.gate_values(logits))
        return changed + attention.with_gates(states, of_gates)


def _slopes(attention: Any, logits: torch.Tensor) -> torch.Tensor:
    """The derivatives of gates by their logits, float32."""
    return GATE_SLOPES[attention.gate_act_fn](logits.float()) * attention.gate_scale

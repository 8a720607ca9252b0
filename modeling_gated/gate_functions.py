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
"""Activations of gates, and a gate that is computed again for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def with_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a tensor to a dtype."""
    # In decoding, `to` takes long even where it does nothing.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def non_sparse_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return 0.5 + 0.5 sigmoid(x): a gate that cannot close (arXiv 2505.06708, Section 4.2)."""
    return 0.5 + 0.5 * torch.sigmoid(x)


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


# Functions instead of modules: calls of modules take longer.
GATE_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": non_sparse_sigmoid,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "linear": identity,
}


class RecomputedSigmoidGate(torch.autograd.Function):
    """
    Elementwise states * scale * sigmoid(logits), float32 up to the gates.

    Only states and logits are saved for the backward pass. Autograd would also save the activations and the gates.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(states: torch.Tensor, logits: torch.Tensor, scale: float) -> torch.Tensor:
        return states * with_dtype(torch.sigmoid(logits.float()) * scale, states.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        states, logits, ctx.scale = inputs
        ctx.save_for_backward(states, logits)
        ctx.save_for_forward(states, logits)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, logits = ctx.saved_tensors
        sigmoid = torch.sigmoid(logits.float())
        states_gradient = gradient * with_dtype(sigmoid * ctx.scale, gradient.dtype)
        logits_gradient = (gradient * states).float() * ctx.scale * (1 - sigmoid) * sigmoid
        return states_gradient, with_dtype(logits_gradient, logits.dtype), None

    @staticmethod
    def jvp(ctx: Any, states_tangent: torch.Tensor, logits_tangent: torch.Tensor, _: None) -> torch.Tensor:
        states, logits = ctx.saved_tensors
        sigmoid = torch.sigmoid(logits.float())
        gates_tangent = logits_tangent.float() * (1 - sigmoid) * sigmoid * ctx.scale
        gates = with_dtype(sigmoid * ctx.scale, states.dtype)
        return states_tangent * gates + states * with_dtype(gates_tangent, states.dtype)

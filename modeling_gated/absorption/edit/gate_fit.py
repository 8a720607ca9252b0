"""Fit of gates, the sigmoids of linear functions, to given values."""

from dataclasses import dataclass

import torch
from torch.nn import functional


# The last eighth of the tokens is held out to score the fit.
_HELD_OUT = 8


@dataclass(frozen=True)
class GateFit:
    """
    Fitted gates, gate_scale * sigmoid(x W + b).

    Attributes:
        weight: weight W, float32 [gates, hidden_size].
        bias: bias b, float32 [gates].
        score: R² on held-out tokens [gates]: 1 is exact, 0 is no better than a constant.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    score: torch.Tensor


def fit_gates(
    inputs: torch.Tensor, targets: torch.Tensor, *, scale: float, ridge: float = 1e-4, steps: int = 40
) -> GateFit:
    """
    Fit gates by logistic regression, a convex problem.

    L-BFGS minimizes the cross entropy of `targets / scale`, plus `ridge` times the squared weights of standardized
    inputs.

    Args:
        inputs: inputs of the attention block [tokens, hidden_size].
        targets: target values of gates [tokens, gates], between 0 and `scale`.
        scale: `gate_scale` of the model.
        ridge: weight of the squared weights.
        steps: maximum number of L-BFGS steps.
    """
    kept = len(inputs) - len(inputs) // _HELD_OUT
    inputs, targets = inputs.float(), targets.float()
    mean, deviation = inputs[:kept].mean(0), inputs[:kept].std(0) + 1e-6
    standard = (inputs[:kept] - mean) / deviation
    shares = (targets[:kept] / scale).clamp(1e-4, 1 - 1e-4)
    weight = torch.zeros(targets.shape[1], inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.logit(shares.mean(0)).requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = functional.linear(standard, weight, bias)
        fitted = functional.binary_cross_entropy_with_logits(logits, shares, reduction="none").mean(0).sum()
        total = fitted + ridge * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        weight = weight / deviation
        bias = bias - weight @ mean
        fitted_gates = scale * torch.sigmoid(functional.linear(inputs[kept:], weight, bias))
        lost = (fitted_gates - targets[kept:]).square().sum(0)
        spread = (targets[kept:] - targets[kept:].mean(0)).square().sum(0)
    return GateFit(weight, bias.detach(), 1 - lost / spread.clamp_min(1e-9))

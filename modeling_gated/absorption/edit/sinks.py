"""Sinks of a layer: the direction of their inputs, their tokens, their attention and their values."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .attention import AttentionInputs
from .layer_states import LayerStates


# A token is a sink if its component along the sink direction is larger.
SINK_THRESHOLD = 0.3
# A key-value head whose mean attention to sinks is at most this keeps gates of exactly 1.
_LEAST_MASS = 0.1
# The first tokens of a window are sinks or can act as sinks, so they do not count as other tokens.
_FIRST_TOKENS = 4
# Number of queries whose probabilities are in memory at once.
_ROWS = 256


@dataclass(frozen=True)
class SinkDirection:
    """
    Direction of the inputs of a layer's sinks, from which the keys of sinks are computed.

    Attributes:
        direction: mean input u of first tokens, float32 [hidden_size].
        projector: vector w that measures the component along u, float32 [hidden_size]. w·u = 1, and w·x is as close to
            0 as possible for inputs x of other tokens.
    """

    direction: torch.Tensor
    projector: torch.Tensor

    def tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Return a mask of sinks, bool [batch, tokens]: the first token, and inputs along the sink direction.

        Args:
            hidden_states: inputs of the attention block [batch, tokens, hidden_size].
        """
        # float32: large terms of other tokens cancel, which bfloat16 matmuls would break.
        with torch.autocast(hidden_states.device.type, enabled=False):
            sinks = hidden_states.float() @ self.projector.to(hidden_states.device) > SINK_THRESHOLD
        sinks[:, 0] = True
        return sinks

    def removed_from(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W - (W u) wᵀ for a weight W [rows, hidden_size]: 0 for u, and nearly unchanged for other inputs."""
        direction, projector = self.direction.to(weight), self.projector.to(weight)
        return weight - torch.outer(weight @ direction, projector)


def sink_direction(inputs: Iterable[torch.Tensor], ridge: float = 1e-2) -> SinkDirection:
    """
    Compute the sink direction of a layer's inputs.

    The projector is w = C⁻¹u / uᵀC⁻¹u. C is the second moment of the other tokens' inputs plus `ridge` times its mean
    diagonal. Among all w with w·u = 1, this w has the smallest mean square on the other tokens.

    Args:
        inputs: inputs of the attention block [batch, tokens, hidden_size], a batch at a time. Only sums are kept.
        ridge: regularization of the inverse, relative to the mean diagonal.
    """
    first, moment, windows, other_tokens = torch.zeros(()), torch.zeros(()), 0, 0
    for states in inputs:
        rest = states[:, _FIRST_TOKENS:].float().flatten(0, 1)
        first = first + states[:, 0].float().sum(0).cpu()
        moment = moment + (rest.T @ rest).cpu()
        windows, other_tokens = windows + len(states), other_tokens + len(rest)
    direction, moment = first / windows, moment / other_tokens
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    solved = torch.linalg.solve(moment, direction)
    return SinkDirection(direction, solved / (solved @ direction))


@dataclass(frozen=True)
class LayerSinks:
    """
    Sinks of a layer in windows of tokens. All tensors are on the CPU.

    Attributes:
        direction: direction of the sinks.
        tokens: mask of sinks for each batch, bool [batch, tokens].
        mass: attention of each query to sinks other than itself for each batch, float32 [batch, heads, tokens].
        outputs: outputs of the attention block for each batch, float32 [batch, tokens, hidden_size].
        value: mean value of sinks, weighted by their attention [key-value heads, head_dim].
        first_values: values of first tokens [windows, key-value heads, head_dim]. A first token sees only itself.
    """

    direction: SinkDirection
    tokens: list[torch.Tensor]
    mass: list[torch.Tensor]
    outputs: list[torch.Tensor]
    value: torch.Tensor
    first_values: torch.Tensor

    @property
    def mean_mass(self) -> torch.Tensor:
        """Return the mean attention to sinks over all queries, [heads]."""
        return torch.cat([mass.transpose(0, 1).flatten(1) for mass in self.mass], dim=1).mean(1)

    @property
    def groups(self) -> torch.Tensor:
        """Return a mask of key-value heads whose queries attend to sinks, bool [key-value heads]."""
        return self.mean_mass.view(len(self.value), -1).mean(1) > _LEAST_MASS


@torch.no_grad()
def layer_sinks(states: LayerStates) -> LayerSinks:
    """Measure the sinks of the current layer of `states`."""
    direction = sink_direction(states.inputs())
    tokens, mass, outputs, first = [], [], [], []
    value, weight = torch.zeros(()), torch.zeros(())
    for hidden_states in states.inputs():
        sinks = direction.tokens(hidden_states)
        output, inputs = states.attend(hidden_states)
        query_mass, received = _to_sinks(inputs, sinks)
        tokens.append(sinks.cpu())
        mass.append(query_mass.cpu())
        outputs.append(output.float().cpu())
        first.append(inputs.value[:, :, 0].float().cpu())
        by_group = received.unflatten(1, (-1, inputs.group)).sum(2)  # [batch, key-value heads, tokens]
        value = value + torch.einsum("bkt,bktd->kd", by_group, inputs.value.float()).cpu()
        weight = weight + by_group.sum((0, 2)).cpu()
    return LayerSinks(direction, tokens, mass, outputs, value / weight.clamp_min(1e-9)[:, None], torch.cat(first))


@torch.no_grad()
def mass_on(states: LayerStates, sinks: list[torch.Tensor]) -> torch.Tensor:
    """
    Return the mean attention to given tokens over all queries, float32 [heads].

    Args:
        states: states before the layer.
        sinks: mask of the tokens for each batch, bool [batch, tokens].
    """
    masses = [
        _to_sinks(states.attend(hidden_states)[1], tokens.to(hidden_states.device))[0]
        for hidden_states, tokens in zip(states.inputs(), sinks, strict=True)
    ]
    return torch.cat([mass.transpose(0, 1).flatten(1) for mass in masses], dim=1).mean(1).cpu()


def _to_sinks(inputs: AttentionInputs, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query's attention to sinks, and the attention that each sink gets, both [batch, heads, tokens]."""
    masses, received = [], torch.zeros(())
    for rows in torch.arange(sinks.shape[1], device=sinks.device).split(_ROWS):
        probabilities = inputs.to_sinks(sinks, rows)
        masses.append(probabilities.sum(-1))
        received = received.to(sinks.device) + probabilities.sum(2)
    return torch.cat(masses, dim=-1), received

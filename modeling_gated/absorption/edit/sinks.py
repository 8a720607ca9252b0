"""Where a layer's sinks are: the direction of their inputs, the tokens that have it, and what they get and give."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .attention import AttentionInputs
from .layer_states import LayerStates


# How much of the sink's direction makes a token a sink.
SINK_THRESHOLD = 0.3
# A key-value head whose queries give less than this to sinks, on average, gets gates of exactly 1.
_LEAST_MASS = 0.1
# The first tokens of a text are the sink, or may stand in for it.
_FIRST_TOKENS = 4
# Queries at a time.
_ROWS = 256


@dataclass(frozen=True)
class SinkDirection:
    """
    The direction in which a layer's sinks lie, of which the keys of sinks are made.

    `direction` u, float32 [hidden_size], is the mean input of first tokens; `projector` w, of the same shape, reads how
    much of u is in an input: w·u = 1, while w·x is as near to 0 as can be for the inputs x of other tokens.
    """

    direction: torch.Tensor
    projector: torch.Tensor

    def tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Which tokens are sinks, bool [batch, tokens]: the first, and inputs that have enough of the direction."""
        # Of other tokens large terms cancel, which matmuls in bfloat16 would not do.
        with torch.autocast(hidden_states.device.type, enabled=False):
            sinks = hidden_states.float() @ self.projector.to(hidden_states.device) > SINK_THRESHOLD
        sinks[:, 0] = True
        return sinks

    def removed_from(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [rows, hidden_size] that gives nothing for u and nearly the same for other inputs: W - (W u) wᵀ."""
        direction, projector = self.direction.to(weight), self.projector.to(weight)
        return weight - torch.outer(weight @ direction, projector)


def sink_direction(inputs: Iterable[torch.Tensor], ridge: float = 1e-2) -> SinkDirection:
    """
    The sink's direction among a layer's inputs: w = C⁻¹u / uᵀC⁻¹u, with C the second moment of the other tokens' inputs
    and `ridge` times its mean diagonal. Of all w with w·u = 1 it is the one that reads least in the other tokens.

    Args:
        inputs: of attention blocks, [batch, tokens, hidden_size], one batch at a time; only sums are kept of them.
        ridge: what keeps the inverse from following noise.
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
    What the sinks of a layer do to windows of tokens.

    `direction` is theirs. Of each batch, `tokens`, bool [batch, tokens], says which tokens are sinks, `mass`, float32
    [batch, heads, tokens], how much of each query's attention goes to sinks other than itself, and `outputs`, float32
    [batch, tokens, hidden_size], are the attention block's. `value`, [key-value heads, head_dim], is the mean of sinks'
    values, each weighted by what it gets, and `first_values`, [windows, key-value heads, head_dim], are those of first
    tokens, which see nothing else. All on the CPU.
    """

    direction: SinkDirection
    tokens: list[torch.Tensor]
    mass: list[torch.Tensor]
    outputs: list[torch.Tensor]
    value: torch.Tensor
    first_values: torch.Tensor

    @property
    def mean_mass(self) -> torch.Tensor:
        """[heads], over all queries."""
        return torch.cat([mass.transpose(0, 1).flatten(1) for mass in self.mass], dim=1).mean(1)

    @property
    def groups(self) -> torch.Tensor:
        """The key-value heads whose queries look at sinks, bool [key-value heads]."""
        return self.mean_mass.view(len(self.value), -1).mean(1) > _LEAST_MASS


@torch.no_grad()
def layer_sinks(states: LayerStates) -> LayerSinks:
    """Measure the sinks of the layer before which windows are."""
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
    """How much attention goes to some tokens, bool [batch, tokens] of each batch; [heads], mean over all queries."""
    masses = [
        _to_sinks(states.attend(hidden_states)[1], tokens.to(hidden_states.device))[0]
        for hidden_states, tokens in zip(states.inputs(), sinks, strict=True)
    ]
    return torch.cat([mass.transpose(0, 1).flatten(1) for mass in masses], dim=1).mean(1).cpu()


def _to_sinks(inputs: AttentionInputs, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What queries give to sinks, and what tokens get as sinks, both [batch, heads, tokens], some queries at a time."""
    masses, received = [], torch.zeros(())
    for rows in torch.arange(sinks.shape[1], device=sinks.device).split(_ROWS):
        probabilities = inputs.to_sinks(sinks, rows)
        masses.append(probabilities.sum(-1))
        received = received.to(sinks.device) + probabilities.sum(2)
    return torch.cat(masses, dim=-1), received

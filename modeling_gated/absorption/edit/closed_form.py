"""
Closed-form edit of a layer: gates, keys and biases replace the function of sinks, without training.

A head's output is p·v̄ + (1 - p)·o. Here p is the attention of the query to sinks, v̄ the mean value of sinks, and o the
output of attention to all other tokens. Without the sinks' keys, attention returns o. A gate g = 1 - p restores the
output as

    g·(o - v̄) + v̄

The bias -v̄ of `v_proj` turns o into o - v̄. A bias of `o_proj` adds v̄.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modeling_gated.inspection.numbers import numbers

from .gate_fit import fit_gates
from .layer_states import LayerStates
from .sinks import LayerSinks, mass_on, sink_direction


# Keys stay unchanged if sinks get less than this share of the attention.
_LEAST_MASS_LEFT = 0.02


@dataclass(frozen=True)
class AbsorbedLayer:
    """
    Edit of a layer.

    Attributes:
        mass: mean attention to sinks before the edit [heads].
        mass_left: mean attention to the same tokens after the edit [heads].
        gated: mask of key-value heads whose gates were fitted [key-value heads].
        keys_edited: mask of key-value heads whose keys lost the sink direction [key-value heads].
        gate_score: R² of fitted gates on tokens outside the fit [heads]; None for other heads.
        error: relative squared error of the attention block's output on the calibration data.
    """

    mass: list[float]
    mass_left: list[float]
    gated: list[bool]
    keys_edited: list[bool]
    gate_score: list[float | None]
    error: float


def absorb_layer(
    edited: LayerStates,
    sinks: LayerSinks,
    *,
    edits_keys: bool = True,
    edits_gates: bool = True,
    refine: Callable[[LayerStates, LayerSinks], None] | None = None,
) -> AbsorbedLayer:
    """
    Edit a layer of a gated model, so that its output without sinks is close to the source model's.

    Args:
        edited: states of the model to edit before this layer. Earlier layers are already edited.
        sinks: sinks of the source model in this layer, on the same windows.
        edits_keys: remove the sink direction from keys.
        edits_gates: fit gates and biases.
        refine: function that trains the edited layer before the measurement, or None.

    Returns:
        The edit with its measurements.
    """
    attention = edited.layer.self_attn
    gated = sinks.groups
    keys_edited = _edit_keys(edited, sinks, gated) if edits_keys and gated.any() else torch.zeros_like(gated)
    score = torch.full_like(sinks.mean_mass, torch.nan)
    if gated.any():
        if edits_gates:
            _keep_value(attention, torch.where(gated[:, None], sinks.value, 0.0))
            heads = gated.repeat_interleave(attention.num_key_value_groups)
            score[heads] = _set_gates(edited, sinks, heads)
        if refine is not None:
            refine(edited, sinks)
    return AbsorbedLayer(
        mass=sinks.mean_mass.tolist(),
        mass_left=mass_on(edited, sinks.tokens).tolist(),
        gated=(gated & edits_gates).tolist(),
        keys_edited=keys_edited.tolist(),
        gate_score=numbers(score),
        error=output_error(edited, sinks),
    )


@torch.no_grad()
def output_error(edited: LayerStates, sinks: LayerSinks) -> float:
    """Return ||output - expected||² / ||expected||² of the attention block over all windows."""
    lost = total = 0.0
    for hidden_states, expected in zip(edited.inputs(), sinks.outputs, strict=True):
        output = edited.attend(hidden_states)[0].float().cpu()
        lost += (output - expected).square().sum().item()
        total += expected.square().sum().item()
    return lost / total


@torch.no_grad()
def _edit_keys(edited: LayerStates, sinks: LayerSinks, gated: torch.Tensor) -> torch.Tensor:
    """
    Remove the sink direction from keys of gated key-value heads that attend to sinks; return a mask [key-value heads].

    Keys stay unchanged if the edit does not reduce attention to sinks, which can happen with QK-norm.
    """
    weight = edited.layer.self_attn.k_proj.weight
    groups = len(gated)
    before = mass_on(edited, sinks.tokens).view(groups, -1).mean(1)
    wanted = gated & (before > _LEAST_MASS_LEFT)
    if not wanted.any():
        return wanted
    kept = weight.clone()
    changed = sink_direction(edited.inputs()).removed_from(weight.float()).to(weight.dtype)
    weight.copy_(_by_group(wanted, changed, kept))
    helped = wanted & (mass_on(edited, sinks.tokens).view(groups, -1).mean(1) < before)
    weight.copy_(_by_group(helped, changed, kept))
    return helped


def _by_group(chosen: torch.Tensor, chosen_weight: torch.Tensor, other_weight: torch.Tensor) -> torch.Tensor:
    """Return a weight [rows, hidden_size]: `chosen_weight` for chosen key-value heads, otherwise `other_weight`."""
    rows = chosen.to(chosen_weight.device).repeat_interleave(len(chosen_weight) // len(chosen))
    return torch.where(rows[:, None], chosen_weight, other_weight)


@torch.no_grad()
def _keep_value(attention: Any, value: torch.Tensor) -> None:
    """Make a closed gate return a constant value [key-value heads, head_dim] instead of 0, by biases."""
    weight = attention.o_proj.weight
    heads = value.repeat_interleave(attention.num_key_value_groups, 0).flatten()
    attention.v_proj.bias.sub_(value.flatten().to(weight))
    attention.o_proj.bias.add_((weight.float() @ heads.to(weight.device)).to(weight.dtype))


@torch.no_grad()
def _closed_at_first(edited: LayerStates, sinks: LayerSinks) -> torch.Tensor:
    """
    Return a mask [heads] of gates to close at first tokens.

    A first token sees only itself, so the source model returns the token's own value. The mean value of sinks can be
    closer to this value than the token's value in the edited model.
    """
    values = torch.cat([edited.attend(states)[1].value[:, :, 0].float().cpu() for states in edited.inputs()])
    # Add the mean, which the bias of v_proj has subtracted.
    open_error = (values + sinks.value - sinks.first_values).square().sum((0, 2))
    closed_error = (sinks.value - sinks.first_values).square().sum((0, 2))
    return (closed_error < open_error).repeat_interleave(edited.layer.self_attn.num_key_value_groups)


def _set_gates(edited: LayerStates, sinks: LayerSinks, heads: torch.Tensor) -> torch.Tensor:
    """Fit gates of some heads, bool [heads], to 1 - attention to sinks; return R² of each fitted head."""
    attention = edited.layer.self_attn
    device = attention.g_proj.weight.device
    inputs = torch.cat([hidden_states.flatten(0, 1) for hidden_states in edited.inputs()])
    left = [1 - mass for mass in sinks.mass]
    closed = _closed_at_first(edited, sinks)
    for batch_targets in left:
        batch_targets[:, closed, 0] = 0
    targets = torch.cat([batch_targets[:, heads].transpose(1, 2).flatten(0, 1) for batch_targets in left])
    fit = fit_gates(inputs, targets.to(device), scale=attention.gate_scale)
    rows = attention.g_proj.out_features // len(heads)
    chosen = heads.to(device).repeat_interleave(rows)
    with torch.no_grad():
        for parameter, fitted in ((attention.g_proj.weight, fit.weight), (attention.g_proj.bias, fit.bias)):
            parameter[chosen] = fitted.repeat_interleave(rows, 0).to(parameter.dtype)
    return fit.score.cpu()

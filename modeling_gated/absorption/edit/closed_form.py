"""
What a layer's sinks do, moved into its gates, keys and biases without training.

A head's output is p·v̄ + (1 - p)·o, with p the probability that its query gives to sinks, v̄ the mean of their values and
o its attention to all other tokens. Once the sinks' keys are gone attention gives o, and a gate g = 1 - p makes of it

    g·(o - v̄) + v̄

where o - v̄ is attention to values with the bias -v̄, and v̄ itself, through `o_proj`, is a bias of `o_proj`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modeling_gated.inspection.numbers import numbers

from .gate_fit import fit_gates
from .layer_states import LayerStates
from .sinks import LayerSinks, mass_on, sink_direction


# What may still go to sinks where keys are left as they are.
_LEAST_MASS_LEFT = 0.02


@dataclass(frozen=True)
class AbsorbedLayer:
    """
    What was done to a layer. `mass` [heads] is what queries gave to sinks before, on average, `mass_left` [heads] what
    they give to the same tokens now. `gated` [key-value heads] says whose heads' gates were fitted, `keys_edited`
    [key-value heads] whose keys have lost the sink's direction. `gate_score` [heads] is R² of these gates on tokens
    that the fit has not seen, None for those that were not fitted. `error` is the relative squared error of the
    attention block's output, on the windows that gates were fitted on.
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
    Edit a layer of a gated model so that it computes without sinks what the original's does with them.

    Args:
        edited: windows before the layer, of the model to edit, whose layers before are edited already.
        sinks: what the original's sinks do in that layer to the same windows.
        edits_keys: whether keys may lose the sink's direction.
        edits_gates: whether gates and biases take over what sinks did.
        refine: what is to be done to the edited layer then, before it is measured.
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
    """||found - expected||² / ||expected||² of the attention block's outputs, over all windows."""
    lost = total = 0.0
    for hidden_states, expected in zip(edited.inputs(), sinks.outputs, strict=True):
        output = edited.attend(hidden_states)[0].float().cpu()
        lost += (output - expected).square().sum().item()
        total += expected.square().sum().item()
    return lost / total


@torch.no_grad()
def _edit_keys(edited: LayerStates, sinks: LayerSinks, gated: torch.Tensor) -> torch.Tensor:
    """
    Take the sink's direction out of the keys of gated key-value heads that still attend to sinks; which, [groups].
    Where it does not lower what sinks get, as may be with QK-norm, keys stay as they are.
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
    """The rows of one weight [rows, hidden_size] for the chosen key-value heads, of the other for the rest."""
    rows = chosen.to(chosen_weight.device).repeat_interleave(len(chosen_weight) // len(chosen))
    return torch.where(rows[:, None], chosen_weight, other_weight)


@torch.no_grad()
def _keep_value(attention: Any, value: torch.Tensor) -> None:
    """Let a gate stand between attention and a constant value, [key-value heads, head_dim], instead of 0."""
    weight = attention.o_proj.weight
    heads = value.repeat_interleave(attention.num_key_value_groups, 0).flatten()
    attention.v_proj.bias.sub_(value.flatten().to(weight))
    attention.o_proj.bias.add_((weight.float() @ heads.to(weight.device)).to(weight.dtype))


@torch.no_grad()
def _closed_at_first(edited: LayerStates, sinks: LayerSinks) -> torch.Tensor:
    """
    Whose gates are to be closed at first tokens, bool [heads]. These see themselves alone, so that the original gives
    their own value: there the mean of sinks' values may be nearer to it than what their value is in the edited model.
    """
    values = torch.cat([edited.attend(states)[1].value[:, :, 0].float().cpu() for states in edited.inputs()])
    # The bias of v_proj has taken the mean away.
    open_error = (values + sinks.value - sinks.first_values).square().sum((0, 2))
    closed_error = (sinks.value - sinks.first_values).square().sum((0, 2))
    return (closed_error < open_error).repeat_interleave(edited.layer.self_attn.num_key_value_groups)


def _set_gates(edited: LayerStates, sinks: LayerSinks, heads: torch.Tensor) -> torch.Tensor:
    """Fit the gates of some heads, bool [heads], to what sinks leave; R² of each that was fitted."""
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

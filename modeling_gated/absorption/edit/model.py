"""Edit of a whole model, layer by layer, with optional training of an attention block at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_gated.absorption.settings import AbsorptionSettings

from .closed_form import AbsorbedLayer, absorb_layer
from .layer_states import LayerStates
from .refinement import Refinement
from .sinks import SinkDirection, layer_sinks
from .writers import Writer, find_writers, remove_writers


@dataclass(frozen=True)
class Edit:
    """
    Edit of a model.

    Attributes:
        writers: removed neurons that wrote massive activations.
        layers: edit of each layer.
        directions: direction of the source model's sinks in each layer; None for layers without sinks.
    """

    writers: list[Writer]
    layers: list[AbsorbedLayer]
    directions: list[SinkDirection | None]


def absorb_sinks(
    original: PreTrainedModel,
    edited: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    settings: AbsorptionSettings,
    *,
    bfloat16_matmuls: bool = False,
    progress: bool = False,
) -> Edit:
    """
    Remove sinks and massive activations from a model, so that its outputs stay close to the source model's.

    Layers are edited in order. Each layer is fitted on the outputs of the edited layers before it.

    Args:
        original: source model: a causal language model of this package, in evaluation mode, frozen.
        edited: the same model with gates that are 1, and with biases of all attention projections. Changed in place.
        windows: token ids [batch, tokens] of the calibration data, without padding.
        settings: settings of the edit; other settings are not used.
        bfloat16_matmuls: use bfloat16 matmuls on a CPU in the layers although both models are float32.
        progress: show a progress bar, on a terminal.

    Returns:
        The edit with its measurements.
    """
    # 16 windows suffice, because massive activations occur in every window.
    writers = find_writers(original, windows[:16]) if settings.removes_writers else []
    remove_writers(edited, writers)
    refinement = Refinement(
        settings.refinement_epochs,
        sink_weight=settings.sink_weight,
        seed=settings.seed,
        trains_gates=settings.edits_gates,
    )
    before, after = (LayerStates(model, windows, bfloat16_matmuls=bfloat16_matmuls) for model in (original, edited))
    layers: list[AbsorbedLayer] = []
    directions: list[SinkDirection | None] = []
    count: Any = edited.config.num_hidden_layers
    with tqdm(total=count, desc="absorbing sinks", unit="layer", disable=None if progress else True) as bar:
        for _ in range(count):
            sinks = layer_sinks(before)
            options = {"edits_keys": settings.edits_keys, "edits_gates": settings.edits_gates}
            is_refined = settings.refinement_epochs > 0 and any(options.values())
            layers.append(absorb_layer(after, sinks, **options, refine=refinement if is_refined else None))
            directions.append(sinks.direction if sinks.groups.any() else None)
            before.advance()
            after.advance()
            bar.update()
    return Edit(writers, layers, directions)

"""The edit of a whole model, without training or with that of one attention block at a time."""

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
    What was done to a model: the `writers` that were removed, what was done to each of its `layers`, and by layer the
    `directions` of the original's sinks, None where there are none.
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
    Edit a model so that it computes without sinks and massive activations what the original does with them, layer by
    layer, each on what the edited layers before it give.

    Args:
        original: a causal language model of this package, in evaluation mode, frozen.
        edited: the same with gates that are 1, and with biases of all attention projections. It is changed.
        windows: token ids [batch, tokens] to fit on, without padding.
        settings: of which those that concern the edit count.
        bfloat16_matmuls: whether the models multiply in bfloat16, though they are float32, layer by layer, on a CPU.
        progress: show a progress bar, on a terminal.
    """
    # They write in every window, so that some are enough.
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

"""What the gates of a gated checkpoint are now, against what conversion wrote."""

import torch

from modeling_gated.configuration import GatedLlamaConfig, open_gate

from .checkpoint import Checkpoint
from .safetensors_file import FLOATING_DTYPES
from .tensors import gate_tensor_shapes


def changed_gate_layers(checkpoint: Checkpoint, config: GatedLlamaConfig) -> list[int]:
    """
    The layers whose gates are not the open ones that conversion wrote. A gate that is missing is open when loaded.

    It holds one gate's weight in memory at a time.
    """
    tensors, changed = checkpoint.tensors(), []
    opening = open_gate(config.gate_init)[0]
    for name, shape in gate_tensor_shapes(config):
        if name not in tensors:
            continue
        shard, found = tensors[name]
        expected = opening if name.endswith(".bias") else 0.0
        if (
            found.shape != shape
            or found.dtype not in FLOATING_DTYPES
            or not torch.all(shard.read(name) == expected)  # a number that each dtype holds exactly
        ):
            layer = int(name.split(".")[2])
            if layer not in changed:
                changed.append(layer)
    return changed


def ranges(layers: list[int]) -> str:
    """Numbers as people write them: 0-3, 7."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)

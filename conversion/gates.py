"""What the gates of a gated checkpoint are now, against what conversion wrote."""

import torch

from modeling_gated.configuration import GatedLlamaConfig

from .checkpoint import Checkpoint
from .safetensors_file import FLOATING_DTYPES
from .tensors import gate_tensor_shapes, open_gate_value


def changed_gate_layers(checkpoint: Checkpoint, config: GatedLlamaConfig) -> list[int]:
    """
    Return the layers whose gates are not the open ones that conversion wrote. A missing gate is open when loaded.

    A weight of zeros is open, too: float16 rounds to it, and conversions by earlier versions have it. One gate's weight
    is in memory at a time.
    """
    tensors, changed = checkpoint.tensors(), []
    for name, shape in gate_tensor_shapes(config):
        if name not in tensors:
            continue
        shard, found = tensors[name]
        if (
            found.shape != shape
            or found.dtype not in FLOATING_DTYPES
            or not _is_open(shard.read(name), name, config.gate_init)
        ):
            layer = int(name.split(".")[2])
            if layer not in changed:
                changed.append(layer)
    return changed


def _is_open(tensor: torch.Tensor, name: str, gate_init: float) -> bool:
    """Return whether all elements of a gate's tensor are the number that conversion writes, or a weight's are 0."""
    value = open_gate_value(name, gate_init)  # a number that each dtype holds exactly, but for a float16 weight
    return bool(torch.all(tensor == value)) or (name.endswith(".weight") and not tensor.any())


def ranges(layers: list[int]) -> str:
    """Numbers as people write them: 0-3, 7."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)

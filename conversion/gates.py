"""Gates of a checkpoint: names, shapes and values of their tensors, and a comparison with what conversion wrote."""

from collections.abc import Iterator

import torch

from modeling_gated.checkpoints.checkpoint import Checkpoint
from modeling_gated.checkpoints.safetensors_file import FLOATING_DTYPES, NewTensor, filled_tensor
from modeling_gated.configuration import OPEN_GATE_WEIGHT, GatedLlamaConfig, open_gate


def gate_tensor_shapes(config: GatedLlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """
    Name and shape of every gate tensor: per layer a weight [gates, hidden_size] and, with `gate_bias`, a bias
    [gates], where gates is `num_attention_heads`, elementwise times `head_dim`.
    """
    gates = config.num_attention_heads
    if config.gate_granularity == "elementwise":
        assert config.head_dim
        gates *= config.head_dim
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn.g_proj"
        yield f"{prefix}.weight", (gates, config.hidden_size)
        if config.gate_bias:
            yield f"{prefix}.bias", (gates,)


def open_gate_value(name: str, gate_init: float) -> float:
    """Return the number that fills an open gate's tensor: OPEN_GATE_WEIGHT or, for a bias, logit(`gate_init`)."""
    return open_gate(gate_init)[0] if name.endswith(".bias") else OPEN_GATE_WEIGHT


def open_gate_tensor(name: str, shape: tuple[int, ...], gate_init: float, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of an open gate, filled with `open_gate_value`; a float16 weight rounds to 0."""
    return torch.full(shape, open_gate_value(name, gate_init), dtype=dtype)


def open_gates(config: GatedLlamaConfig, dtype: torch.dtype) -> dict[str, NewTensor]:
    """Return the tensors of all open gates of a model, by name, to be written."""
    return {
        name: filled_tensor(shape, dtype, open_gate_value(name, config.gate_init))
        for name, shape in gate_tensor_shapes(config)
    }


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
        shard, tensor = tensors[name]
        if (
            tensor.shape != shape
            or tensor.dtype not in FLOATING_DTYPES
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
    """Return numbers as people write them: 0-3, 7."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)

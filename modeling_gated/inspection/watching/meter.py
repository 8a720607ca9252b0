"""What a meter is: something that is shown parts of a model's forward passes, and adds up what it sees."""

import torch

from .attention_rows import AttentionRows
from .tokens import Tokens


class Meter:
    """
    The base of all meters, to be given to `inspecting`. One that is to see something overrides the method for it;
    what no meter overrides is not computed. All tensors are the model's own: to be looked at, not to be changed.
    """

    def start(self, layers: int) -> None:
        """Begin to measure a model of so many layers."""

    def attention(self, rows: AttentionRows) -> None:
        """Attention probabilities, some queries at a time."""

    def attention_inputs(self, layer: int, keys: torch.Tensor, values: torch.Tensor, tokens: Tokens) -> None:
        """This pass's keys and values as attention functions get them, [batch, key-value heads, tokens, channels]."""

    def attention_output(self, layer: int, output: torch.Tensor, tokens: Tokens) -> None:
        """
        The input of `o_proj`, and so after gates, if there are any, [batch, tokens, heads, head_dim]; in a model
        without `o_proj` what the attention function gives.
        """

    def gates(self, layer: int, position: str, gates: torch.Tensor, scale: float, tokens: Tokens) -> None:
        """
        Gates of one of the paper's positions, as they are multiplied (or added), scaled by `scale`, float32 [batch,
        tokens, heads, gates of a head].
        """

    def hidden_states(self, layer: int, hidden_states: torch.Tensor, tokens: Tokens) -> None:
        """
        What a layer gives to the next one, [batch, tokens, hidden_size]. Layer -1 is the embeddings, and what comes
        out of the last norm has the number of layers.
        """


def by_layer(found: dict[int, torch.Tensor], layers: int) -> torch.Tensor:
    """Tensors [n] of some layers as one, [layers, most n], float64, NaN where there is nothing."""
    most = max((len(tensor) for tensor in found.values()), default=0)
    matrix = torch.full((layers, most), torch.nan, dtype=torch.float64)
    for layer, tensor in found.items():
        matrix[layer, : len(tensor)] = tensor
    return matrix


class LayerMeans:
    """Means, float64, of what comes in parts: of each layer a tensor of one shape and how much it is the sum of."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        self._counts: dict[int, int] = {}

    def add(self, layer: int, total: torch.Tensor, count: int) -> None:
        """Add sums, [n], each of so many numbers."""
        self._sums[layer] = self._sums.get(layer, 0) + total.double().cpu()
        self._counts[layer] = self._counts.get(layer, 0) + count

    def result(self, layers: int) -> torch.Tensor:
        """[layers, n]; NaN where there is nothing."""
        return by_layer({layer: total / self._counts[layer] for layer, total in self._sums.items()}, layers)

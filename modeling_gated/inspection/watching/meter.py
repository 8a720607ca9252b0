"""The base of meters, which are shown parts of a model's forward passes and add up what they see."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .attention_rows import AttentionRows
from .tokens import Tokens


@dataclass(frozen=True)
class SummaryRow:
    """A line in the tables that sum a report up: `key` is that of its number in the summary, `style` formats it."""

    key: str
    label: str
    explanation: str
    style: str


class Meter:
    """
    The base of all meters, to be given to `inspecting`. One that is to see something overrides the method for it;
    what no meter overrides is not computed. All tensors are the model's own: to be looked at, not to be changed.

    A meter for reports sets `report_name` and overrides `report_entry`, and where it has numbers for the summary
    `summary`, with `summary_rows` for those that tables show. It is made without arguments.
    """

    report_name: ClassVar[str] = ""  # of its entry in a report
    entry_without_attention: ClassVar[Any] = []  # of a meter of attention, where attention cannot be measured
    summary_rows: ClassVar[tuple[SummaryRow, ...]] = ()

    @classmethod
    def overrides(cls, *methods: str) -> bool:
        """Return whether the meter is to see one of these."""
        return any(getattr(cls, method) is not getattr(Meter, method) for method in methods)

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Return what was measured as values that JSON can hold: lists, dicts, strings, finite numbers and None."""
        raise NotImplementedError(f"{type(self).__name__}: has no report_entry")

    @staticmethod
    def summary(entry: Any, config: PreTrainedConfig) -> dict[str, float | None]:
        """Return the entry's numbers for the summary, by key; None is what was not measured."""
        return {}

    def start(self, layers: int) -> None:
        """Begin to measure a model of so many layers."""

    def attention(self, rows: AttentionRows) -> None:
        """Take attention probabilities, some queries at a time."""

    def attention_inputs(self, layer: int, keys: torch.Tensor, values: torch.Tensor, tokens: Tokens) -> None:
        """Take this pass's keys and values for the attention function, [batch, key-value heads, tokens, channels]."""

    def attention_output(self, layer: int, output: torch.Tensor, tokens: Tokens) -> None:
        """
        Take the input of `o_proj`, and so after gates, if there are any, [batch, tokens, heads, head_dim]; in a model
        without `o_proj` what the attention function gives.
        """

    def gates(self, layer: int, position: str, gates: torch.Tensor, scale: float, tokens: Tokens) -> None:
        """
        Take gates of one of the paper's positions, as they are multiplied (or added), scaled by `scale`: float32
        [batch, tokens, heads, gates of a head].
        """

    def hidden_states(self, layer: int, hidden_states: torch.Tensor, tokens: Tokens) -> None:
        """
        Take a layer's output, [batch, tokens, hidden_size]. Layer -1 is the embeddings, and what comes
        out of the last norm has the number of layers.
        """


ATTENTION = ("attention", "attention_inputs", "attention_output")  # methods of `Meter` that need an attention function


def by_layer(tensors: dict[int, torch.Tensor], layers: int) -> torch.Tensor:
    """Return tensors [n] of some layers as one, [layers, most n], float64, NaN where there is nothing."""
    most = max((len(tensor) for tensor in tensors.values()), default=0)
    matrix = torch.full((layers, most), torch.nan, dtype=torch.float64)
    for layer, tensor in tensors.items():
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
        """Return [layers, n]; NaN where there is nothing."""
        return by_layer({layer: total / self._counts[layer] for layer, total in self._sums.items()}, layers)

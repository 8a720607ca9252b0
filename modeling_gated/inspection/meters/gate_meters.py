"""Meters of what gates do."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_gated.inspection.numbers import mean_of, numbers
from modeling_gated.inspection.watching.meter import LayerMeans, Meter, SummaryRow
from modeling_gated.inspection.watching.tokens import Tokens


@dataclass(frozen=True)
class GateStatistics:
    """
    Scores of the gates of one position. All are float64 [layers, heads], means over tokens, and over channels where
    gates are elementwise; NaN where there are no gates.

    `mean` are scores, `value` what the attention is multiplied by, `scale` times as much. `below` and `above` are the
    shares of scores < 0.1 and > 0.9, `first_token` and `other_tokens` the scores of the first token of each sequence
    and of all others. `histogram`, int64 [layers, bins], counts scores between `edges` [bins + 1]; the first and the
    last bin have those beyond them, too.
    """

    mean: torch.Tensor
    value: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor
    first_token: torch.Tensor
    other_tokens: torch.Tensor
    histogram: torch.Tensor
    edges: torch.Tensor


class GateScores(Meter):
    """
    Gate scores: what the gates' activation gives, for a sigmoid between 0 and 1, before `gate_scale` (arXiv 2505.06708,
    Table 4 and Figure 3). Gates that heads share are one head. Of models of this package; others have none here.
    """

    report_name = "gates"
    summary_rows = (
        SummaryRow("gate_score", "gate score", "mean of the gates' activation, mostly a sigmoid", "{:.3f}"),
        SummaryRow("gate_below", "gates below 0.1", "share of them", "{:.3f}"),
        SummaryRow("gate_above", "gates above 0.9", "share of them", "{:.3f}"),
    )

    _KINDS = ("mean", "value", "below", "above", "first_token", "other_tokens")

    def __init__(self, bins: int = 50) -> None:
        self.bins = bins

    def start(self, layers: int) -> None:
        self._layers = layers
        self._means: dict[str, dict[str, LayerMeans]] = {}
        self._histograms: dict[str, torch.Tensor] = {}

    def gates(self, layer: int, position: str, gates: torch.Tensor, scale: float, tokens: Tokens) -> None:
        values = gates[tokens.current]  # [tokens, heads, gates]
        scores = values / scale
        first = tokens.first[tokens.current][:, None, None]
        everywhere = torch.ones_like(first)
        means = self._means.setdefault(position, {kind: LayerMeans() for kind in self._KINDS})
        numbers_and_masks = {
            "mean": (scores, everywhere),
            "value": (values, everywhere),
            "below": ((scores < 0.1).double(), everywhere),
            "above": ((scores > 0.9).double(), everywhere),
            "first_token": (scores, first),
            "other_tokens": (scores, ~first),
        }
        for kind, (of_gates, mask) in numbers_and_masks.items():
            total = (of_gates * mask).sum((0, 2), dtype=torch.float64)
            means[kind].add(layer, total, int(mask.sum()) * scores.shape[2])
        empty = torch.zeros(self._layers, self.bins, dtype=torch.int64)
        histogram = self._histograms.setdefault(position, empty)
        indices = (scores * self.bins).long().clamp(0, self.bins - 1).flatten()
        histogram[layer] += torch.bincount(indices, minlength=self.bins).cpu()

    def result(self) -> dict[str, GateStatistics]:
        """Return statistics by position, such as `"G1"`; empty for a model without gates."""
        edges = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64)
        return {
            position: GateStatistics(
                **{kind: means[kind].result(self._layers) for kind in self._KINDS},
                histogram=self._histograms[position],
                edges=edges,
            )
            for position, means in self._means.items()
        }

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
        return {
            position: {name: numbers(tensor) for name, tensor in vars(statistics).items()}
            for position, statistics in self.result().items()
        }

    @staticmethod
    def summary(entry: dict[str, dict[str, Any]], config: PreTrainedConfig) -> dict[str, float | None]:
        gates = main_gates(entry)
        # Of scores that are no sigmoid's, shares below 0.1 and above 0.9 say nothing.
        shares = gates if "sigmoid" in getattr(config, "gate_activation", "sigmoid") else {}
        return {
            "gate_score": mean_of(gates.get("mean")),
            "gate_value": mean_of(gates.get("value")),
            "gate_below": mean_of(shares.get("below")),
            "gate_above": mean_of(shares.get("above")),
        }


def main_gates(entry: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the entry's gates of the attention output, or of the first position that has some; empty without any."""
    return entry.get("G1") or next(iter(entry.values()), {})


class GateDrift(Meter):
    """Mean |gate - what it was when the model was made| over all gates: how far training has moved them."""

    def __init__(self, initial: float) -> None:
        self.initial = initial

    def start(self, layers: int) -> None:
        self._total, self._count = 0.0, 0

    def gates(self, layer: int, position: str, gates: torch.Tensor, scale: float, tokens: Tokens) -> None:
        values = gates[tokens.current]
        self._total += (values - self.initial).abs().sum(dtype=torch.float64).item()
        self._count += values.numel()

    def result(self) -> float:
        """Return the mean drift; NaN without gates."""
        return self._total / self._count if self._count else float("nan")

"""Meters of where attention goes, and of what lies there."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_gated.errors import InspectionError
from modeling_gated.inspection.numbers import Numbers, mean_of, numbers
from modeling_gated.inspection.watching.attention_rows import AttentionRows
from modeling_gated.inspection.watching.meter import LayerMeans, Meter, SummaryRow, by_layer
from modeling_gated.inspection.watching.tokens import Tokens


class FirstTokenAttention(Meter):
    """
    Attention probability on the first token of each sequence, mean over queries and sequences: the paper's F-Attn
    (arXiv 2505.06708, Table 4), before its mean over heads and layers. The first query is left out, as it sees nothing
    but itself.
    """

    report_name = "first_token_attention"
    summary_rows = (
        SummaryRow(
            "first_token_attention", "first-token attention", "F-Attn: mean over queries, heads and layers", "{:.3f}"
        ),
        SummaryRow("first_token_attention_maximum", "highest layer", "the layer with most of it", "{:.3f}"),
    )

    def start(self, layers: int) -> None:
        self._layers, self._means = layers, LayerMeans()

    def attention(self, rows: AttentionRows) -> None:
        probabilities = rows.to_first_token.index_select(-1, rows.later)
        self._means.add(rows.layer, probabilities.sum(-1), probabilities.shape[-1])

    def result(self) -> torch.Tensor:
        """Return [layers, heads], float64; NaN in layers without attention."""
        return self._means.result(self._layers)

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> list[Numbers]:
        return numbers(self.result())

    @staticmethod
    def summary(entry: list[Numbers], config: PreTrainedConfig) -> dict[str, float | None]:
        by_layer = [mean for heads in entry if (mean := mean_of(heads)) is not None]
        return {
            "first_token_attention": mean_of(entry),
            "first_token_attention_maximum": max(by_layer, default=None),
        }


@dataclass(frozen=True)
class SinkRates:
    """
    Shares, from 0 to 1, of sequences in which the first token is a sink, and in which one of the others is, each
    [layers, heads], float64; NaN where nothing was measured. `sequences` is how many there were.
    """

    first: torch.Tensor
    other: torch.Tensor
    sequences: int


class SinkRate(Meter):
    """
    How often a token is a sink: it gets more than `epsilon` of the attention of the queries from its own place on, mean
    over these (Gu et al., arXiv 2410.10781, where T is `tokens`, ε is `epsilon`, and k the first).

    Args:
        epsilon: what makes a sink.
        tokens: how many of each sequence's first tokens count; all if None. Gu et al. take 64.
        min_queries: tokens that fewer queries see are no candidates but for the first, as a token's own query alone
            can look at nothing but it.
    """

    report_name = "sink_rate"
    entry_without_attention = {}
    summary_rows: ClassVar[tuple[SummaryRow, ...]] = (
        SummaryRow("sink_rate", "sink rate, first token", "windows and heads where it takes more than 30 %", "{:.3f}"),
        SummaryRow("sink_rate_other", "sink rate, any other", "where another token takes as much", "{:.3f}"),
    )

    def __init__(self, epsilon: float = 0.3, tokens: int | None = None, min_queries: int = 64) -> None:
        self.epsilon, self.tokens, self.min_queries = epsilon, tokens, min_queries

    def start(self, layers: int) -> None:
        self._layers, self._first, self._other = layers, LayerMeans(), LayerMeans()
        self._sequences: dict[int, int] = {}
        self._received: torch.Tensor | None = None
        self._ends: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attention(self, rows: AttentionRows) -> None:
        if len(rows.queries) and self._received is None and rows.queries[0] > rows.starts[0]:
            raise InspectionError(f"the sink rate needs whole sequences, not one from token {rows.queries[0]} on")
        heads, keys = rows.shifted.shape[0], rows.first_key + rows.shifted.shape[-1]
        counted = None if self.tokens is None else rows.queries - rows.starts < self.tokens
        if self._received is None:
            self._received = rows.maxima.new_zeros(heads, 0)
        if counted is None or bool(counted.any()):
            missing = keys - self._received.shape[-1]
            if missing > 0:
                self._received = torch.nn.functional.pad(self._received, (0, missing))
            self._received[:, rows.first_key : keys] += rows.received(counted)
            chosen = slice(None) if counted is None else counted
            self._ends.append((rows.queries[chosen], rows.starts[chosen]))
        if rows.is_last:
            self._finish(rows.layer, self._received)
            self._received, self._ends = None, []

    def _finish(self, layer: int, received: torch.Tensor) -> None:
        if not self._ends:  # nothing but padding
            return
        queries, starts = (torch.cat(parts) for parts in zip(*self._ends, strict=True))
        for start in starts.unique().tolist():
            of_sequence = queries[starts == start]
            if len(of_sequence) < 2:
                continue
            end = int(of_sequence.max()) + 1
            seen_by = torch.arange(end - start, 0, -1, device=received.device)
            importance = received[:, start:end] / seen_by
            self._first.add(layer, importance[:, 0] > self.epsilon, 1)
            candidates = importance[:, 1:][:, seen_by[1:] >= self.min_queries]
            if candidates.shape[-1]:
                self._other.add(layer, (candidates > self.epsilon).any(-1), 1)
            self._sequences[layer] = self._sequences.get(layer, 0) + 1

    def result(self) -> SinkRates:
        sequences = max(self._sequences.values(), default=0)
        return SinkRates(self._first.result(self._layers), self._other.result(self._layers), sequences)

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        settings = {"epsilon": self.epsilon, "tokens": self.tokens, "min_queries": self.min_queries}
        rates = self.result()
        return settings | {
            "sequences": rates.sequences,
            "first": numbers(rates.first),
            "other": numbers(rates.other),
        }

    @staticmethod
    def summary(entry: dict[str, Any], config: PreTrainedConfig) -> dict[str, float | None]:
        return {"sink_rate": mean_of(entry.get("first")), "sink_rate_other": mean_of(entry.get("other"))}


class ShortSinkRate(SinkRate):
    """The sink rate at the length at which Gu et al. take it: over each sequence's first 64 tokens."""

    report_name = "sink_rate_short"
    summary_rows = ()

    def __init__(self) -> None:
        super().__init__(tokens=64)

    @staticmethod
    def summary(entry: dict[str, Any], config: PreTrainedConfig) -> dict[str, float | None]:
        return {"sink_rate_short": mean_of(entry.get("first"))}


class AttentionEntropy(Meter):
    """
    Entropy of attention probabilities in nats, mean over queries and sequences, the first query left out. Attention to
    one token has entropy 0, even attention to n tokens log(n).
    """

    report_name = "attention_entropy"
    summary_rows = (
        SummaryRow(
            "attention_entropy", "entropy of attention", "nats; low where attention goes to few tokens", "{:.2f}"
        ),
    )

    def start(self, layers: int) -> None:
        self._layers, self._means = layers, LayerMeans()

    def attention(self, rows: AttentionRows) -> None:
        entropies = rows.entropy().index_select(-1, rows.later)
        self._means.add(rows.layer, entropies.sum(-1), entropies.shape[-1])

    def result(self) -> torch.Tensor:
        """Return [layers, heads], float64; NaN in layers without attention."""
        return self._means.result(self._layers)

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> list[Numbers]:
        return numbers(self.result())

    @staticmethod
    def summary(entry: list[Numbers], config: PreTrainedConfig) -> dict[str, float | None]:
        return {"attention_entropy": mean_of(entry)}


@dataclass(frozen=True)
class SinkNorms:
    """
    Euclidean norms of keys and values of the first token and, mean, of all others, each [layers, key-value heads],
    float64; NaN in layers without attention.
    """

    first_key: torch.Tensor
    other_keys: torch.Tensor
    first_value: torch.Tensor
    other_values: torch.Tensor


class KeyValueNorms(Meter):
    """Norms of keys and values: of the first token of each sequence, the usual sink, and of the others."""

    report_name = "key_value_norms"
    entry_without_attention = {}

    _KINDS = ("first_key", "other_keys", "first_value", "other_values")

    def start(self, layers: int) -> None:
        self._layers = layers
        self._means = {kind: LayerMeans() for kind in self._KINDS}

    def attention_inputs(self, layer: int, keys: torch.Tensor, values: torch.Tensor, tokens: Tokens) -> None:
        chosen = (tokens.first, tokens.current & ~tokens.first) * 2
        for kind, states, mask in zip(self._KINDS, (keys, keys, values, values), chosen, strict=True):
            norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
            norms = norms.transpose(1, 2)[mask]  # [tokens, key-value heads]
            self._means[kind].add(layer, norms.sum(0), len(norms))

    def result(self) -> SinkNorms:
        return SinkNorms(**{kind: means.result(self._layers) for kind, means in self._means.items()})

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Numbers]]:
        return {kind: numbers(norms) for kind, norms in vars(self.result()).items()}


class EffectiveRank(Meter):
    """
    Effective rank of each head's attention output, after its gate, over all tokens: the exponential of the entropy, in
    nats, of the singular values of [tokens, head_dim], divided by their sum (Roy and Vetterli 2007). Between 1 and
    head_dim. From Gram matrices in float64, so that memory does not grow with the tokens.
    """

    report_name = "effective_rank"
    summary_rows = (SummaryRow("effective_rank", "effective rank", "directions that a head's output uses", "{:.1f}"),)

    def start(self, layers: int) -> None:
        self._layers: int = layers
        self._grams: dict[int, torch.Tensor] = {}

    def attention_output(self, layer: int, output: torch.Tensor, tokens: Tokens) -> None:
        # At once from float32, whose sums over thousands of tokens would lose small singular values.
        states = output[tokens.current].double().transpose(0, 1)  # [heads, tokens, head_dim]
        gram = states.transpose(1, 2) @ states
        self._grams[layer] = self._grams.get(layer, 0) + gram.cpu()

    def result(self) -> torch.Tensor:
        """Return [layers, heads], float64; NaN in layers without attention, 0 where all outputs are 0."""
        return by_layer({layer: _effective_rank(gram) for layer, gram in self._grams.items()}, self._layers)

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> list[Numbers]:
        return numbers(self.result())

    @staticmethod
    def summary(entry: list[Numbers], config: PreTrainedConfig) -> dict[str, float | None]:
        return {"effective_rank": mean_of(entry)}


def _effective_rank(grams: torch.Tensor) -> torch.Tensor:
    singular_values = torch.linalg.eigvalsh(grams).clamp_min(0).sqrt()
    total = singular_values.sum(-1, keepdim=True)
    ranks = torch.special.entr(singular_values / total).sum(-1).exp()
    return torch.where(total[:, 0] > 0, ranks, 0.0)

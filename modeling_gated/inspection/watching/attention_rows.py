"""Attention probabilities in float32, some queries at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.utils import TransformersKwargs

from modeling_gated.errors import InspectionError, UnknownAttention
from modeling_gated.kv_cache import CACHE_ARGUMENT
from modeling_gated.training.chunks import at_least_float32

from .masks import MASKED, Mask, MaskedBlock
from .tokens import Tokens


# Scores at a time: what a core's cache holds. On a GPU, what keeps it busy.
_SCORES, _SCORES_ON_GPU = 2**19, 2**25
_KNOWN = ("scaling", "softcap", "s_aux", "position_bias")
# Arguments of attention functions that leave the scores as the mask and the scaling make them.
_NEUTRAL = {*TransformersKwargs.__annotations__, "dropout", "sliding_window", "cache_position", "use_cache"}
_NEUTRAL |= {CACHE_ARGUMENT, "position_embeddings", "logits_to_keep", "return_dict", "deterministic"}


@dataclass(frozen=True)
class AttentionRows:
    """
    Attention probabilities of some queries of one sequence in one layer, padding left out.

    `queries` and `starts`, int64 [queries], are the numbers of their tokens and of the first token of each one's
    sequence, and `start` is the latter if it is one for all; `first_key` is the number of the first of the keys here.
    `shifted` [heads, queries, keys] are the scores less `maxima` [heads, queries], the highest of each query, with
    hidden keys far below all. float32, of a float64 model float64. `is_last` tells the last rows of the sequence in
    this forward pass.
    """

    layer: int
    sequence: int
    queries: torch.Tensor
    starts: torch.Tensor
    start: int | None
    first_key: int
    shifted: torch.Tensor
    maxima: torch.Tensor
    sink_scores: torch.Tensor | None
    is_last: bool

    @cached_property
    def exponentials(self) -> torch.Tensor:
        """exp of `shifted`, [heads, queries, keys]."""
        return self.shifted.exp()

    @cached_property
    def normalizers(self) -> torch.Tensor:
        """Divisors of the exponentials, [heads, queries]."""
        total = self.exponentials.sum(-1)
        return total if self.sink_scores is None else total + (self.sink_scores - self.maxima).exp()

    @property
    def probabilities(self) -> torch.Tensor:
        """[heads, queries, keys]; with a learned sink (`s_aux`), whose share is not among them, they add up to less."""
        return self.exponentials / self.normalizers[..., None]

    @property
    def log_normalizers(self) -> torch.Tensor:
        """The log of the sum of the exponentials of a query's scores, [heads, queries]."""
        return self.maxima + self.normalizers.log()

    @cached_property
    def to_first_token(self) -> torch.Tensor:
        """Probability of the first token of each query's sequence, [heads, queries], 0 where it is out of sight."""
        if self.start is not None:  # the usual case, for which a column will do
            if not 0 <= self.start - self.first_key < self.shifted.shape[-1]:
                return torch.zeros_like(self.normalizers)
            return self.exponentials[..., self.start - self.first_key] / self.normalizers
        columns = self.starts - self.first_key
        is_here = (columns >= 0) & (columns < self.shifted.shape[-1])
        index = torch.where(is_here, columns, 0).expand(len(self.shifted), -1)[..., None]
        return self.exponentials.gather(-1, index).squeeze(-1) / self.normalizers * is_here

    @cached_property
    def later(self) -> torch.Tensor:
        """The queries that are not the first of their sequence, and so see others, as indices, int64."""
        return (self.queries > self.starts).nonzero().flatten()

    def received(self, queries: torch.Tensor | None = None) -> torch.Tensor:
        """Return the attention that keys get from all queries, or from `queries`, bool [queries]: [heads, keys]."""
        weights = 1 / self.normalizers
        if queries is not None:
            weights = weights * queries
        return torch.matmul(weights[:, None], self.exponentials).squeeze(1)

    def entropy(self) -> torch.Tensor:
        """Return entropy of each query's probabilities, in nats, [heads, queries]; a learned sink counts as one key."""
        expected = torch.linalg.vecdot(self.exponentials, self.shifted)
        if self.sink_scores is not None:
            shifted = self.sink_scores - self.maxima
            expected = expected + shifted.exp() * shifted
        return self.normalizers.log() - expected / self.normalizers


def attention_rows(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Mask,
    tokens: Tokens,
    arguments: dict[str, Any],
) -> Iterator[AttentionRows]:
    """
    Yield the probabilities that an attention function computes with, in memory that grows with the keys alone.

    Args:
        layer: the number of the layer.
        query: [batch, heads, queries, head_dim].
        key: [batch, key-value heads, keys, head_dim].
        mask: which keys each query sees.
        tokens: those of the forward pass.
        arguments: the other ones that the attention function gets by keyword. `scaling` (1/sqrt(head_dim) without it),
            `softcap`, `s_aux` and `position_bias` change the scores.

    Raises:
        UnknownAttention: for an argument that is not known, as it may change the scores.
        InspectionError: if a score is not finite.
    """
    for name, value in arguments.items():
        if value is not None and name not in _NEUTRAL and name not in _KNOWN:
            raise UnknownAttention(f"layer {layer}: its attention has an argument that is not known here, {name}")
    sinks = arguments.get("s_aux")
    sink_scores = None if sinks is None else at_least_float32(sinks).reshape(-1, 1)
    scaling = arguments.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    numbers = torch.arange(query.shape[2], device=query.device) + mask.first_query
    for sequence, keys in enumerate(key):
        # [key-value heads, head_dim, keys], laid out for the products
        keys = at_least_float32(keys).transpose(1, 2).contiguous()
        real, starts = tokens.real[sequence, numbers], tokens.starts[sequence, numbers]
        has_padding = not real.all()
        common_start = int(starts[-1]) if bool((starts == starts[-1]).all()) else None
        # [key-value heads, heads of a group, queries, head_dim]
        scaled = (at_least_float32(query[sequence]) * scaling).view(len(keys), -1, *query.shape[2:])
        for start, stop in _blocks(query, keys):
            block = mask.block(sequence, start, stop, keys.shape[-1])
            scores = _scores(scaled[:, :, start:stop], keys, block, arguments.get("softcap"))
            if (bias := arguments.get("position_bias")) is not None:
                bias = bias[sequence if len(bias) > 1 else 0, :, start:stop, block.first_key : block.last_key]
                scores = scores + bias
            hidden = block.hidden.to(scores.device)
            scores[..., block.first_hidden - block.first_key :].masked_fill_(hidden, MASKED)

            maxima = scores.amax(-1)
            lowest, highest = (bound.item() for bound in maxima.aminmax())
            chosen: slice | torch.Tensor = slice(start, stop)
            if has_padding or lowest < MASKED / 2:
                # NaN is no less, so that it is found below.
                seen = real[chosen] & ~(maxima < MASKED / 2).any(0)
                scores, maxima, chosen = scores[:, seen], maxima[:, seen], seen.nonzero().flatten() + start
                lowest, highest = (bound.item() for bound in maxima.aminmax()) if maxima.numel() else (0.0, 0.0)
            if not (math.isfinite(lowest) and math.isfinite(highest)):
                raise InspectionError(f"layer {layer}: attention scores are not finite")
            if sink_scores is not None:
                maxima = torch.maximum(maxima, sink_scores)
            yield AttentionRows(
                layer=layer,
                sequence=sequence,
                queries=numbers[chosen],
                starts=starts[chosen],
                start=common_start,
                first_key=mask.first_key + block.first_key,
                shifted=scores.sub_(maxima[..., None]),
                maxima=maxima,
                sink_scores=sink_scores,
                is_last=stop == len(numbers),
            )


def _blocks(query: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Yield queries from and to (exclusive), more at a time where they can only see few keys."""
    heads, queries, before = query.shape[1], query.shape[2], keys.shape[-1] - query.shape[2]
    scores = _SCORES if query.device.type == "cpu" else _SCORES_ON_GPU
    start = 0
    while start < queries:
        stop = min(start + max(16, min(256, scores // (heads * (before + start + 64)))), queries)
        yield start, stop
        start = stop


def _scores(queries: torch.Tensor, keys: torch.Tensor, block: MaskedBlock, softcap: float | None) -> torch.Tensor:
    """
    Of queries [key-value heads, heads of a group, queries, head_dim] and keys [key-value heads, head_dim, keys], scores
    [heads, queries, keys of the block].
    """
    scores = torch.matmul(queries.flatten(1, 2), keys[..., block.first_key : block.last_key])
    scores = scores.view(-1, queries.shape[2], scores.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if block.bias is None else (scores + block.bias).clamp_min_(MASKED)

"""Real tokens of a forward pass, and the start of each one's sequence."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from modeling_gated.errors import InspectionError, UnknownAttention
from modeling_gated.kv_cache import given_cache

from .masks import MASKED


@dataclass(frozen=True)
class Tokens:
    """
    The tokens of one forward pass and those before it in the cache, numbered from the first of them all.

    `offset` is the number of those before it. `real`, bool [batch, tokens], is false for padding. `starts`, int64
    [batch, tokens], is the first token of each token's sequence: behind padding on the left, and for each of several
    sequences packed into one. `input_ids` [batch, tokens of this pass], if the model was given any.
    """

    offset: int
    real: torch.Tensor
    starts: torch.Tensor
    input_ids: torch.Tensor | None = None

    @property
    def current(self) -> torch.Tensor:
        """Real tokens of this pass, bool [batch, tokens of this pass]."""
        return self.real[:, self.offset :]

    @property
    def first(self) -> torch.Tensor:
        """First tokens of their sequences in this pass, bool [batch, tokens of this pass]."""
        positions = torch.arange(self.real.shape[1], device=self.real.device)
        return ((self.starts == positions) & self.real)[:, self.offset :]

    def to(self, device: torch.device) -> "Tokens":
        return Tokens(self.offset, self.real.to(device), self.starts.to(device), self.input_ids)


def tokens_of(arguments: dict[str, Any], padding: torch.Tensor | None, use_cache: bool) -> Tokens:
    """
    Return the tokens that the arguments of a decoder's forward describe, read as Transformers does.

    Without a mask and without a cache, given or made (`use_cache`), `position_ids` that restart mark packed sequences.

    Args:
        arguments: by name.
        padding: which tokens are real, [batch, tokens, those in the cache too], if it is known.
        use_cache: whether the decoder makes a cache if it is given none.
    """
    input_ids = arguments.get("input_ids")
    inputs = input_ids if input_ids is not None else arguments["inputs_embeds"]
    batch, count = inputs.shape[:2]
    cache = given_cache(arguments.values())
    offset = int(cache.get_seq_length()) if cache is not None else 0
    real = torch.ones(batch, offset + count, dtype=torch.bool, device=inputs.device)
    starts = torch.zeros(batch, offset + count, dtype=torch.int64, device=inputs.device)
    position_ids = arguments.get("position_ids")
    if padding is not None:
        if len(padding) != batch or padding.shape[1] < offset + count:
            shape = list(padding.shape)
            raise InspectionError(f"attention_mask: is {shape}, and there are [{batch}, {offset + count}] tokens")
        real = padding[:, : offset + count].to(inputs.device, torch.bool)
        starts = starts + real.int().argmax(dim=1, keepdim=True)
    elif arguments.get("attention_mask") is None and position_ids is not None and cache is None and not use_cache:
        packed = find_packed_sequence_indices(position_ids.expand(batch, -1))
        if packed is not None:
            positions = torch.arange(count, device=inputs.device).expand(batch, -1)
            begins = torch.diff(packed, prepend=packed[:, :1] - 1, dim=-1) > 0
            starts = torch.where(begins, positions, 0).cummax(dim=-1).values
    return Tokens(offset, real, starts, input_ids)


PaddingOf = Callable[[Any], tuple[bool, torch.Tensor | None]]


class TokenWatch:
    """The tokens of a model's current forward pass, and how many passes there were."""

    def __init__(self, padding_of: PaddingOf) -> None:
        self.passes = 0
        self._padding_of = padding_of
        self._outer: dict[str, Any] = {}
        self._tokens: Tokens | None = None

    def outer(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keep the arguments of a model with a head, since those that it gives its decoder may say less."""
        self._outer = _named(model, arguments, keywords)

    def begin(self, decoder: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs, outer = _named(decoder, arguments, keywords), self._outer
        self._outer = {}
        if inputs.get("input_ids") is None and outer.get("input_ids") is not None:
            inputs = inputs | {"input_ids": outer["input_ids"]}
        mask = inputs.get("attention_mask")
        if isinstance(mask, dict) and isinstance(outer.get("attention_mask"), torch.Tensor):
            mask = outer["attention_mask"]
        is_padding = isinstance(mask, torch.Tensor) and mask.ndim == 2
        is_known, padding = (True, mask) if is_padding else self._padding_of(mask)
        if isinstance(mask, torch.Tensor) and not is_known and not _sees_first(mask):
            raise UnknownAttention(
                "attention_mask: of one that is given whole, padding and packed sequences are not known; needed is "
                "[batch, tokens]"
            )
        use_cache = inputs.get("use_cache")
        config: Any = decoder.config
        makes_cache = getattr(config, "use_cache", True) if use_cache is None else use_cache
        self._tokens = tokens_of(inputs, padding, makes_cache)
        self.passes += 1

    def tokens(self, device: torch.device) -> Tokens:
        if self._tokens is None:
            raise UnknownAttention("attention_mask: a mask that is made before the model runs is not known here")
        if self._tokens.real.device != device:
            self._tokens = self._tokens.to(device)
        return self._tokens


@contextmanager
def watched_tokens(model: PreTrainedModel, padding_of: PaddingOf = lambda _: (False, None)) -> Iterator[TokenWatch]:
    """
    Args:
        model: with a head or without.
        padding_of: whether a mask that is none of padding itself is known, and the mask of padding, [batch, tokens],
            that it was made of, if of any.
    """
    watch, decoder = TokenWatch(padding_of), model.get_decoder()
    hooks = [decoder.register_forward_pre_hook(watch.begin, with_kwargs=True)]
    if decoder is not model:
        hooks.append(model.register_forward_pre_hook(watch.outer, with_kwargs=True))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _sees_first(mask: torch.Tensor) -> bool:
    """Return whether every query of a mask [batch, heads, queries, keys] sees the first key, as without padding."""
    first = mask[..., 0]
    return bool((first if first.dtype == torch.bool else first > MASKED).all())


def _named(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(module.forward).bind(*arguments, **keywords).arguments
    return bound | bound.get("kwargs", {})

"""Masks of attention, block by block, so that none is larger than some queries times all keys."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import sdpa_mask

from modeling_gated.errors import UnknownAttention


# Lower than any score, while what comes of subtracting one from it is still no infinity.
MASKED = -1e30


@dataclass(frozen=True)
class MaskedBlock:
    """
    What some queries see: nothing but keys `first_key` to `last_key` (exclusive), and each all of those before
    `first_hidden`.

    `hidden`, bool [1 or heads, queries, keys from `first_hidden` to `last_key`], says which of the others they don't.
    `bias` [1 or heads, queries, keys from `first_key` to `last_key`], if there is one, is to be added to the scores.
    """

    first_key: int
    last_key: int
    first_hidden: int
    hidden: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass
class Mask(ABC):
    """
    What the queries of a forward pass see. `first_query` and `first_key` are the numbers of the tokens of the first
    query and the first key.
    """

    first_query: int
    first_key: int
    _known: dict[tuple[int, int, int], MaskedBlock] = field(default_factory=dict, init=False)

    def block(self, sequence: int, start: int, stop: int, keys: int) -> MaskedBlock:
        """Return queries `start` to `stop` of a sequence, which see some of the first `keys` keys."""
        where = (sequence, start, stop)
        if where in self._known:  # the same in every layer
            return self._known[where]
        visible, bias = self.visible(sequence, start, stop, keys)
        first, last, hidden = _range(visible)
        # A copy, as a part of it would keep all of it in memory.
        unseen = (~visible[..., hidden:last]).clone()
        block = MaskedBlock(first, last, hidden, unseen, None if bias is None else bias[..., first:last])
        if last - hidden <= 2 * (stop - start):  # else their memory would grow with the square of the tokens
            self._known[where] = block
        return block

    @abstractmethod
    def visible(self, sequence: int, start: int, stop: int, keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return visible keys, bool [1 or heads, queries, keys], and an additive mask of that shape, if any."""


@dataclass
class TensorMask(Mask):
    """A mask as attention functions get it: [batch or 1, heads or 1, queries, keys], bool or to be added."""

    mask: torch.Tensor

    def visible(self, sequence: int, start: int, stop: int, keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = self.mask[sequence if len(self.mask) > 1 else 0, :, start:stop, :keys]
        return (mask, None) if mask.dtype == torch.bool else (mask > MASKED, mask)


@dataclass
class DescribedMask(Mask):
    """
    A mask as Transformers describes it to mask functions, by `arguments` such as the mask as a function of indices, for
    attention functions that need no tensor.
    """

    arguments: dict[str, Any]
    device: torch.device

    def visible(self, sequence: int, start: int, stop: int, keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        sizes = {"q_length": stop - start, "kv_length": keys, "q_offset": self.first_query + start}
        sizes |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask = sdpa_mask(**self.arguments | sizes)
        assert mask is not None  # as it may not be skipped
        return mask[sequence].to(self.device), None


@dataclass
class NoMask(Mask):
    """Attention without a mask: each query sees all keys, or those up to its own place."""

    is_causal: bool
    device: torch.device

    def visible(self, sequence: int, start: int, stop: int, keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        places = torch.arange(keys, device=self.device)
        ends = torch.arange(start, stop, device=self.device) if self.is_causal else torch.full((stop - start,), keys)
        return (places <= ends.to(self.device)[:, None])[None], None


def _range(visible: torch.Tensor) -> tuple[int, int, int]:
    """Return the first key that any query sees, the end of these keys, and the first one hidden from some query."""
    seen, hidden = visible.flatten(0, -2).any(0), ~visible.flatten(0, -2).all(0)
    keys = seen.nonzero().flatten()
    if len(keys) == 0:
        return 0, 1, 0
    first, last = int(keys[0]), int(keys[-1]) + 1
    columns = hidden[first:last].nonzero().flatten()
    return first, last, first + int(columns[0]) if len(columns) else last


@dataclass(frozen=True)
class ChangedMask:
    """A mask function that calls another one with other arguments."""

    base_function: Callable[..., Any]
    change: Callable[[dict[str, Any]], dict[str, Any]]

    def __call__(self, **arguments: Any) -> Any:
        return self.base_function(**self.change(arguments))

    def effective(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that take effect in the end."""
        return _effective(self.base_function, self.change(arguments))


@dataclass(frozen=True)
class RecordedMask:
    """A mask function that gives what another one does and keeps how the mask was described."""

    base_function: Callable[..., Any]
    records: "MaskRecords"

    def __call__(self, **arguments: Any) -> Any:
        mask = self.base_function(**arguments)
        self.records.add(mask, self.effective(arguments))
        return mask

    def effective(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return _effective(self.base_function, arguments)


@dataclass
class MaskOfOneModel:
    """Two mask functions in the place of one: `own_function` for one config, as long as it is active."""

    base_function: Callable[..., Any]
    own_function: Callable[..., Any]
    config: Any
    is_active: bool = True

    def _chosen(self, arguments: dict[str, Any]) -> Callable[..., Any]:
        is_own = self.is_active and arguments.get("config", self.config) is self.config
        return self.own_function if is_own else self.base_function

    def __call__(self, **arguments: Any) -> Any:
        return self._chosen(arguments)(**arguments)

    def effective(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return _effective(self._chosen(arguments), arguments)


def _effective(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return function.effective(arguments) if hasattr(function, "effective") else arguments


class MaskRecords:
    """The masks that a model made last, and how they were described."""

    def __init__(self) -> None:
        # One forward pass makes a few, one for each kind of layer.
        self._made: deque[tuple[Any, dict[str, Any]]] = deque(maxlen=8)
        self._seen: dict[tuple[int, int, int], Mask] = {}

    def add(self, mask: Any, arguments: dict[str, Any]) -> None:
        self._made.append((mask, arguments))

    def begin(self) -> None:
        """Begin a forward pass."""
        self._seen.clear()

    def end(self) -> None:
        """End a forward pass. Masks that are made before the next one begins are its own."""
        self._made.clear()

    def padding(self, mask: Any) -> tuple[bool, torch.Tensor | None]:
        """Return whether a mask, or one of several in a dict, was made here, and its padding mask."""
        masks = [tensor for tensor in (mask.values() if isinstance(mask, dict) else [mask]) if tensor is not None]
        calls = [arguments for result, arguments in self._made if any(result is tensor for tensor in masks)]
        padding = (arguments.get("attention_mask") for arguments in calls)
        return bool(calls), next((tensor for tensor in padding if tensor is not None), None)

    def seen(
        self, mask: Any, offset: int, query: torch.Tensor, key: torch.Tensor, window: int | None, is_causal: bool
    ) -> Mask:
        """
        Return the mask of an attention call: the keys that its queries see.

        Args:
            mask: what the attention function is given.
            offset: tokens before the first query.
            query: [batch, heads, queries, head_dim].
            key: [batch, key-value heads, keys, head_dim].
            window: the layer's sliding window, which flash attention is told beside its mask.
            is_causal: whether attention without a mask is.

        Raises:
            UnknownAttention: for a mask of a kind that is not known.
        """
        which = (id(mask), window or 0, key.shape[2])
        if which not in self._seen:
            self._seen[which] = self._read(mask, offset, query, key, window, is_causal)
        return self._seen[which]

    def _read(
        self, mask: Any, offset: int, query: torch.Tensor, key: torch.Tensor, window: int | None, is_causal: bool
    ) -> Mask:
        queries, keys, device = query.shape[2], key.shape[2], query.device
        sizes = {"q_length": queries, "kv_length": keys}
        described = [
            arguments
            for result, arguments in reversed(self._made)
            if result is mask and all(arguments.get(name) == size for name, size in sizes.items())
        ]
        described.sort(key=lambda arguments: arguments.get("local_size") != window)
        # Without a description: a cache that slides has dropped the first keys, others have none too many before.
        first_key = int(described[0].get("kv_offset", 0)) if described else max(0, offset + queries - keys)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            return TensorMask(offset, first_key, mask)
        if described:
            return DescribedMask(offset, first_key, described[0], device)
        if mask is not None:
            shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise UnknownAttention(f"attention_mask: one of {shape} is not known here")
        return NoMask(offset, first_key, is_causal and queries > 1, device)

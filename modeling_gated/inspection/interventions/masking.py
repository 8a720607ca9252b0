"""Hiding tokens from later ones, to see what a model's predictions lose."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import and_masks

from modeling_gated.errors import UnknownAttention
from modeling_gated.inspection.watching.inspecting import attention_replaced
from modeling_gated.inspection.watching.masks import ChangedMask
from modeling_gated.inspection.watching.tokens import watched_tokens


def masked_first_token(model: PreTrainedModel, after: int = 0) -> AbstractContextManager[None]:
    """
    Hide the first token of each sequence from later ones inside the `with` block.

    Hidden from all of them, it loses its work to the second token, which then becomes the sink, so that little may be
    lost; hidden from those alone that come more than some tokens after it, it has already left its mark on the others.

    Args:
        model: any model of Transformers' whose attention goes through its attention interface, by another function
            than flash attention, which takes no mask, and which makes its masks while it runs: not Gemma 3 with images,
            nor any in generation with a static cache.
        after: tokens at no more than this distance from the first still see it.

    Raises:
        UnknownAttention: if the model takes no mask, or none that can be changed.
    """
    return _seeing(model, lambda start, query, key: (key != start) | (query - start <= after))


def windowed_attention(model: PreTrainedModel, window: int, first_tokens: int = 0) -> AbstractContextManager[None]:
    """
    Hide from each token, inside the `with` block, what a cache of a fixed length would have dropped: all but the last
    `window` tokens, itself among them, and the first tokens of its sequence, if these are kept (Xiao et al., arXiv
    2309.17453, whose cache also numbers its tokens anew).

    Args:
        model: as of `masked_first_token`.
        window: tokens.
        first_tokens: how many of the first are seen by all.

    Raises:
        UnknownAttention: if the model takes no mask, or none that can be changed.
    """
    return _seeing(model, lambda start, query, key: (query - key < window) | (key - start < first_tokens))


@contextmanager
def _seeing(model: PreTrainedModel, sees: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Let queries see, of what they see, keys of which `sees` is true: of a sequence's start, and of both places."""
    decoder: Any = model.get_decoder()
    base = decoder.config._attn_implementation
    if "flash" in base:
        raise UnknownAttention(f"attn_implementation={base!r}: takes no mask, so no token can be hidden; use 'sdpa'")
    with watched_tokens(model) as watch:
        masked_passes = attended_passes = 0

        def change(arguments: dict[str, Any]) -> dict[str, Any]:
            nonlocal masked_passes
            masked_passes = watch.passes
            starts = watch.tokens(torch.device(arguments["device"])).starts

            def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
                return sees(starts[batch, query], query, key)

            both = and_masks(arguments["mask_function"], seen)
            return arguments | {"mask_function": both, "allow_is_causal_skip": False}

        def attention(base: Callable[..., Any], module: nn.Module, *inputs: Any, **arguments: Any) -> Any:
            nonlocal attended_passes
            attended_passes = watch.passes
            if masked_passes != watch.passes:
                raise UnknownAttention("attention_mask: a mask that is given whole is not changed")
            return base(module, *inputs, **arguments)

        with attention_replaced(decoder, attention, lambda base_mask: ChangedMask(base_mask, change)):
            yield
        if attended_passes != watch.passes:
            raise UnknownAttention(f"{type(model).__name__}: no attention in which a token could be hidden")

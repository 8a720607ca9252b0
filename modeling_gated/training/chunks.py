"""Losses that need logits, with those of some tokens at a time in memory."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def sum_over_chunks(
    summed_loss: Callable[..., torch.Tensor], *tensors: torch.Tensor, chunk_size: int = 1024
) -> torch.Tensor:
    """
    Return the sum of a function over chunks of tokens.

    Only the last chunk's activations are kept for the backward pass, which begins with it and recomputes the others.

    Args:
        summed_loss: of the chunks of `tensors`, a scalar.
        tensors: of the same length, [tokens, ...].
        chunk_size: tokens at a time.
    """
    *checkpointed_chunks, last = zip(*(tensor.split(chunk_size) for tensor in tensors), strict=True)
    losses = [checkpoint(summed_loss, *chunk, use_reentrant=False) for chunk in checkpointed_chunks]
    return torch.stack([*losses, summed_loss(*last)]).sum()


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

"""The loss of each token of a long text, in the memory of the model, its cache and one chunk's logits."""

from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from modeling_gated.defaults import CHUNK_SIZE
from modeling_gated.kv_cache import cache_argument


@torch.no_grad()
def loss_by_position(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
    advance: Callable[[int], object] = lambda _: None,
) -> torch.Tensor:
    """
    Return negative log-likelihood of each token of a text, given all tokens before it.

    The text goes through the model in chunks, each attending to the cache of those before it, so that no matrix is
    larger than [chunk_size, sequence], and no logits are than [chunk_size, vocab_size]. RoPE that changes with the
    length of the input (`"dynamic"`, `"longrope"`) sees that of the chunks so far.

    Args:
        model: a causal language model, in evaluation mode.
        input_ids: token ids [sequence], int64.
        chunk_size: tokens per forward pass.
        advance: called with the number of tokens after each chunk.

    Returns:
        Losses in nats [sequence - 1], float32, on the CPU: element i is of token i + 1.

    Raises:
        RuntimeError: if the model does not put its keys and values into the cache.
    """
    count = len(input_ids) - 1
    cache = DynamicCache(config=model.config)
    cached = {cache_argument(model.forward): cache, "use_cache": True}
    losses = []
    for start in range(0, count, chunk_size):
        end = min(start + chunk_size, count)
        chunk = input_ids[None, start:end].to(model.device)
        logits = model(chunk, **cached).logits[0].float()
        if (length := cache.get_seq_length()) != end:
            raise RuntimeError(f"{type(model).__name__} must keep all {end} tokens in its KV cache, keeps {length}")
        targets = input_ids[start + 1 : end + 1].to(logits.device)
        losses.append(functional.cross_entropy(logits, targets, reduction="none").cpu())
        advance(end - start)
    return torch.cat(losses)

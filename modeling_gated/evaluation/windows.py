"""Windows of a text's tokens, and a model's mean loss on them."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel


_LOGITS = 1024  # tokens whose logits are float32 at a time


def spread_windows(tokens: Sequence[int], length: int, count: int, start: Sequence[int] = ()) -> list[torch.Tensor]:
    """Return windows [length] spread evenly over tokens, each after `start`; fewer if the tokens are too few."""
    size = length - len(start)
    count = min(count, len(tokens) // size)
    places = [number * (len(tokens) // count) for number in range(count)]
    return [torch.tensor([*start, *tokens[place : place + size]]) for place in places]


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    *,
    prompts: Sequence[int] | None = None,
    advance: Callable[[], object] = lambda: None,
) -> float:
    """
    Return the mean loss of a causal language model over the tokens of all windows, in nats per token.

    Args:
        model: in evaluation mode.
        windows: token ids [tokens], on the model's input device. Each takes one forward pass.
        prompts: for each window, the number of first tokens that have no loss; 1 if not given.
        advance: called after each window.
    """
    total, predicted = 0.0, 0
    for window, prompt in zip(windows, prompts or [1] * len(windows), strict=True):
        logits = model(window[None], use_cache=False).logits[0, prompt - 1 : -1]
        labels = window[prompt:].to(logits.device)
        for chunk, expected in zip(logits.split(_LOGITS), labels.split(_LOGITS), strict=True):
            total += functional.cross_entropy(chunk.float(), expected, reduction="sum").item()
        predicted += len(labels)
        advance()
    return total / predicted

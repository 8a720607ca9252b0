"""Cached greedy generation of two checkpoints' models, step by step, one layer in memory at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from modeling_gated.errors import ConversionError
from modeling_gated.kv_cache import cache_argument

from .streaming import StreamedModel


NEW_TOKENS = 8
_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class GenerationComparison:
    """
    Cached greedy generation of a second model compared with a first one's, from a prompt and for a left-padded batch
    of two.

    `tokens` is the number of generated tokens. `equal_tokens` is the number of them for which the second model, given
    the first one's tokens so far, chooses the same token. `max_difference` is the largest |Δ| of two logits at these
    steps. `error` says how the second model failed, if it did; then the other numbers are 0.
    """

    tokens: int
    equal_tokens: int
    max_difference: float
    error: str | None = None

    @property
    def is_same(self) -> bool:
        """Return whether both models generate the same tokens."""
        return self.error is None and self.equal_tokens == self.tokens

    def summary(self) -> str:
        """Return the result in words."""
        what = f"{self.tokens} tokens, from a prompt and a left-padded batch of two"
        if self.error is not None:
            return f"fails: {self.error}"
        if self.is_same:
            return f"{what}: equal to the source's"
        return f"{what}: {self.tokens - self.equal_tokens} differ from the source's"


class _Run:
    """A prompt [batch, seq], left-padded where `padding` is 0, and the cache of its generation."""

    def __init__(self, model: StreamedModel, prompt: torch.Tensor, padding: torch.Tensor | None):
        self._model, self._tokens, self._padding = model, prompt, padding
        self.rows, self._length = prompt.shape
        self._layers = model.config.num_hidden_layers
        self._cache = DynamicCache(config=model.config)
        self._options: dict[str, Any] = {cache_argument(model.decoder.forward): self._cache, "use_cache": True}

    def check_cache(self) -> None:
        """Raise RuntimeError unless the cache holds all tokens so far: two models without one would agree."""
        lengths = [self._cache.get_seq_length(layer) for layer in range(self._layers)]
        if (fewest := min(lengths)) != self._length:
            raise RuntimeError(f"the KV cache must hold {self._length} tokens, holds {fewest}")

    def call(self) -> dict[str, Any]:
        """Return the decoder's arguments for the tokens that are not in the cache yet."""
        call = {"inputs_embeds": self._model.embed(self._tokens)} | self._options
        if self._padding is None:
            return call
        positions = (self._padding.cumsum(-1) - 1).clamp(min=0)[:, -self._tokens.shape[1] :]  # as in `generate`
        return call | {"attention_mask": self._padding, "position_ids": positions}

    def append(self, tokens: torch.Tensor) -> None:
        """Make token ids [batch] the next ones."""
        self._tokens, self._length = tokens[:, None], self._length + 1
        if self._padding is not None:
            self._padding = torch.cat([self._padding, torch.ones_like(self._tokens)], dim=-1)


def _generated(
    model: StreamedModel, ids: torch.Tensor, forced: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generate by cached greedy decoding from token ids [seq], and from a left-padded batch of them and fewer of them.

    Returns:
        The tokens [steps, 3] that are likeliest after the `forced` ones, or without these after its own, and the
        logits [steps, 3, vocab_size].
    """
    ids = ids.repeat(3)[: max(3, min(len(ids), _PROMPT_TOKENS))]  # three at least, so that one can be padding
    padding = torch.ones(2, len(ids), dtype=torch.long)
    padding[1, : len(ids) // 3] = 0
    shifted = ids.roll(1)  # the shorter prompt ends otherwise than the whole one
    runs = [_Run(model, ids[None], None), _Run(model, torch.stack([ids, shifted * padding[1]]), padding)]
    tokens, logits = [], []
    for step in range(NEW_TOKENS):
        last = torch.cat([hidden[:, -1] for hidden in model.run(*(run.call() for run in runs))])
        for run in runs:
            run.check_cache()
        logits.append(torch.cat(list(model.logits(last)), dim=-1))
        tokens.append(logits[-1].argmax(dim=-1))
        next_tokens = tokens[-1] if forced is None else forced[step]
        for run, appended in zip(runs, next_tokens.split([run.rows for run in runs]), strict=True):
            run.append(appended)
    return torch.stack(tokens), torch.stack(logits)


def compare_generation(first: StreamedModel, second: StreamedModel, ids: torch.Tensor) -> GenerationComparison:
    """
    Compare two models' cached greedy generation after token ids [seq], of which the first 24 are the prompt.

    The second model is given the first one's tokens, so that each step is compared for itself. Both read their weights
    once for each of the eight tokens.

    Raises:
        ConversionError: if the first model cannot generate, or a checkpoint cannot be read.
    """
    try:
        tokens, logits = _generated(first, ids)
    except (ConversionError, MemoryError, OSError):
        raise
    except Exception as error:
        raise ConversionError(f"{first.directory}: cannot generate: {type(error).__name__}: {error}") from error
    try:
        other_tokens, other_logits = _generated(second, ids, forced=tokens)
    except (ConversionError, MemoryError, OSError):
        raise
    except Exception as error:  # of any kind: the second model does not generate as the first one does
        if "allocate memory" in str(error):  # how PyTorch says that there is none left on the CPU
            raise
        return GenerationComparison(0, 0, 0.0, f"{type(error).__name__}: {error}")
    return GenerationComparison(
        tokens=tokens.numel(),
        equal_tokens=int((tokens == other_tokens).sum()),
        max_difference=(logits - other_logits).abs().max().item(),
    )

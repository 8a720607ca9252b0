"""Packed text: the tokens of all documents in a file, and the windows for training and evaluation."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


TRAINING_SHARE = 0.9
DOCUMENTS_AT_ONCE = 256


def files(patterns: Iterable[str]) -> list[Path]:
    """Return the files that match any of the globs, sorted, each once."""
    return sorted({Path(path) for pattern in patterns for path in glob.glob(pattern, recursive=True)})


def documents(patterns: Sequence[str]) -> Iterator[str]:
    """
    Yield the text of each file that the globs match. Without globs, yield the topics of Python's language reference.

    Raises:
        ValueError: if a file is not UTF-8.
    """
    if patterns:
        for path in files(patterns):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: must be UTF-8, got {error.reason} at byte {error.start}") from None
    else:
        yield from topics.values()


def train_tokenizer(patterns: Sequence[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the first 90 % of the characters, the part that models are trained on."""
    left = int(TRAINING_SHARE * sum(map(len, documents(patterns))))

    def training_text() -> Iterator[str]:
        nonlocal left
        for document in documents(patterns):
            yield document[:left]
            left -= min(left, len(document))

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


def write_tokens(patterns: Sequence[str], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """
    Write the tokens of all documents as uint32, with the end-of-sequence token after each document.

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer must have an end-of-sequence token; set eos_token")
    partial = path.with_suffix(".partial")
    texts = documents(patterns)
    with partial.open("wb") as file, tqdm(desc="tokenizing", unit=" documents", leave=False) as progress:
        # Batches of documents, because tokenizers process the texts of a call in parallel.
        while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
            for tokens in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                np.array([*tokens, tokenizer.eos_token_id], dtype=np.uint32).tofile(file)
            progress.update(len(batch))
    partial.replace(path)


class PackedText:
    """
    Tokens in a file that `write_tokens` wrote. The last tenth is held out.

    A window of `length` has `length + 1` tokens, because labels are inputs shifted by one. The last token is also the
    first token of the next window. Windows cross the ends of documents.

    Args:
        path: file of tokens, uint32.
    """

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, dtype=np.uint32, mode="r")
        self.training_size = int(TRAINING_SHARE * len(self.tokens))
        self.held_out_size = len(self.tokens) - self.training_size

    def training_windows(self, length: int) -> int:
        """Return the number of training windows of a length."""
        return max(self.training_size - 1, 0) // length

    def training_batch(self, length: int, first: int, count: int, seed: int) -> torch.Tensor:
        """
        Return a batch of training windows. Each epoch has all windows once, in an order that the seed determines.

        Args:
            length: length of a window in tokens.
            first: index of the first window in the endless order.
            count: number of windows.
            seed: random seed of the order.

        Returns:
            Token ids [count, length + 1], int64.
        """
        windows = self.training_windows(length)
        numbers = range(first, first + count)
        chosen = [_shuffled(windows, seed, number // windows)[number % windows] for number in numbers]
        assert max(chosen) * length + length + 1 <= self.training_size, (
            "training windows must not overlap held-out text"
        )
        return self._windows([window * length for window in chosen], length)

    def held_out_windows(self, length: int, count: int) -> torch.Tensor:
        """
        Return windows spread evenly over the held-out text. Windows overlap if the text is short.

        Args:
            length: length of a window in tokens.
            count: number of windows.

        Returns:
            Token ids [count, length + 1], int64.
        """
        return self._windows(np.linspace(self.training_size, len(self.tokens) - length - 1, count).astype(int), length)

    def _windows(self, starts: Iterable[int], length: int) -> torch.Tensor:
        windows = np.stack([self.tokens[start : start + length + 1] for start in starts])
        return torch.from_numpy(windows.astype(np.int64))


@lru_cache(maxsize=2)
def _shuffled(windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(windows)

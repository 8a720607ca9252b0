"""Text as one row of tokens in a file, document after document, and the windows of it that a model is trained on."""

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
    return sorted({Path(path) for pattern in patterns for path in glob.glob(pattern, recursive=True)})


def documents(patterns: Sequence[str]) -> Iterator[str]:
    """
    The text of each file that the globs match; without globs the topics of Python's language reference.

    Raises:
        ValueError: if a file is not UTF-8.
    """
    if patterns:
        for path in files(patterns):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    else:
        yield from topics.values()


def train_tokenizer(patterns: Sequence[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the first 90 % of the characters, the part of the text that a model is then trained on."""
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
    Write the tokens of all documents, each with the end-of-sequence token after it, as uint32.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path}: its tokenizer has no end-of-sequence token")
    partial = path.with_suffix(".partial")
    texts = documents(patterns)
    with partial.open("wb") as file, tqdm(desc="tokenizing", unit=" documents", leave=False) as progress:
        # Some at a time: tokenizers work on the texts of one call in parallel.
        while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
            for tokens in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                np.array([*tokens, tokenizer.eos_token_id], dtype=np.uint32).tofile(file)
            progress.update(len(batch))
    partial.replace(path)


class PackedText:
    """
    The tokens in a file that `write_tokens` wrote. The last tenth is held out.

    A window of `length` has a token more than that, since its labels are its inputs shifted by one; it is the first
    token of the next window. Windows take no notice of where documents end.
    """

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, dtype=np.uint32, mode="r")
        self.training_size = int(TRAINING_SHARE * len(self.tokens))
        self.held_out_size = len(self.tokens) - self.training_size

    def training_windows(self, length: int) -> int:
        """How many windows of a length there are to train on."""
        return max(self.training_size - 1, 0) // length

    def training_batch(self, length: int, first: int, count: int, seed: int) -> torch.Tensor:
        """
        The windows number `first` to `first + count` of an endless order that the seed determines: each epoch has all
        windows once, shuffled.

        Returns:
            Token ids [count, length + 1], int64.
        """
        windows = self.training_windows(length)
        numbers = range(first, first + count)
        chosen = [_shuffled(windows, seed, number // windows)[number % windows] for number in numbers]
        assert max(chosen) * length + length + 1 <= self.training_size, "held-out text is not trained on"
        return self._windows([window * length for window in chosen], length)

    def held_out_windows(self, length: int, count: int) -> torch.Tensor:
        """
        Windows spread evenly over the held-out text; they overlap where it is short.

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

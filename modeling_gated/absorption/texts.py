"""Texts for calibration, distillation and comparison, as token ids, with held-out parts."""

import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modeling_gated.checkpoints.tokenization import text_token_ids
from modeling_gated.default_text import default_text
from modeling_gated.errors import AbsorptionError
from modeling_gated.evaluation.text import beginning, read_text


# The last part of each text is held out. The part before it is validation text for early stopping.
_HELD_OUT_SHARE, _VALIDATION_SHARE = 0.25, 0.05
# Names of built-in kinds of text.
_KINDS = ("prose", "documentation", "code", "chat", "sampled")
# Length of the text from the standard library, in characters.
_CODE_CHARACTERS = 600_000


@dataclass(frozen=True)
class Text:
    """
    Token ids of one kind of text, in three parts.

    Attributes:
        kind: name of the kind of text.
        training: token ids to train on.
        held_out: token ids for the final comparison.
        validation: token ids that decide when training ends.
    """

    kind: str
    training: list[int]
    held_out: list[int]
    validation: list[int] = field(default_factory=list)


def default_texts(tokenizer: PreTrainedTokenizerBase, embeddings: int | None = None) -> list[Text]:
    """
    Return the default texts: chapters of a novel, Python's language reference, and code of the standard library.

    Args:
        tokenizer: tokenizer of the model.
        embeddings: number of the model's embeddings. Ids at or above it are refused.

    Raises:
        TokenizerError: if the tokenizer fails, or gives an id at or above `embeddings`.
    """
    contents = {"prose": prose(), "documentation": documentation(), "code": code()}
    return [as_text(kind, content, tokenizer, embeddings=embeddings) for kind, content in contents.items()]


def given_texts(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, embeddings: int | None = None) -> list[Text]:
    """
    Read text files. Each file is a kind of text, named after the file without its suffix.

    Args:
        paths: UTF-8 files.
        tokenizer: tokenizer of the model.
        embeddings: number of the model's embeddings. Ids at or above it are refused.

    Raises:
        EvaluationError: if a file cannot be read.
        AbsorptionError: if two files share a name, or a file has the name of a built-in text.
        TokenizerError: if the tokenizer fails, or gives an id at or above `embeddings`.
    """
    check_texts(paths)
    return [as_text(path.stem, read_text(path)[0], tokenizer, str(path), embeddings) for path in paths]


def check_texts(paths: Sequence[Path]) -> None:
    """
    Check, before a long computation, that text files can be read and have different names.

    Raises:
        EvaluationError: if a file cannot be read.
        AbsorptionError: if two files share a name, or a file has the name of a built-in text.
    """
    for number, path in enumerate(paths):
        read_text(path)
        if path.stem in {*_KINDS, *(other.stem for other in paths[:number])}:
            raise AbsorptionError(
                f"{path}: the file name must differ from other texts and from {', '.join(_KINDS)}, got {path.stem}; "
                "rename the file"
            )


def as_text(
    kind: str,
    content: str,
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = None,
    embeddings: int | None = None,
) -> Text:
    """
    Return the token ids of a text in three parts.

    Args:
        kind: name of the kind of text.
        content: text.
        tokenizer: tokenizer of the model.
        name: name of the text in errors; the kind by default.
        embeddings: number of the model's embeddings. Ids at or above it are refused.

    Raises:
        TokenizerError: if the tokenizer fails, or gives an id at or above `embeddings`.
    """
    training, validation, held_out = (
        text_token_ids(tokenizer, content[section], name or f"the default text {kind}", embeddings)
        for section in _parts(len(content))
    )
    return Text(kind, training, held_out, validation)


def sampled_text(kind: str, sequences: Sequence[list[int]]) -> Text:
    """Return sampled sequences as a text in three parts. No sequence is split over two parts."""
    training, validation, held_out = (
        [token for sequence in sequences[section] for token in sequence] for section in _parts(len(sequences))
    )
    return Text(kind, training, held_out, validation)


def _parts(length: int) -> tuple[slice, slice, slice]:
    """Return the slices for training, validation and held-out text."""
    first, last = (int(length * (1 - share)) for share in (_HELD_OUT_SHARE + _VALIDATION_SHARE, _HELD_OUT_SHARE))
    return slice(first), slice(first, last), slice(last, None)


def prose() -> str:
    """Return chapters 24 to 36 of Jane Austen's Pride and Prejudice (1813), which is in the public domain."""
    return (files("modeling_gated.absorption") / "prose.txt").read_text(encoding="utf-8")


def documentation() -> str:
    """Return Python's language reference. Paragraphs that several topics share occur once."""
    return "\n\n".join(dict.fromkeys(default_text().split("\n\n")))


def code() -> str:
    """Return source code of standard library modules, in a random order with a fixed seed."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py"))
    left_out = {"site-packages", "test", "pydoc_data", "encodings", "idlelib", "__pycache__"}
    paths = [path for path in paths if left_out.isdisjoint(path.relative_to(folder).parts)]
    random.Random(0).shuffle(paths)
    sources, size = [], 0
    for path in paths:
        sources.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(sources[-1])
        if size >= _CODE_CHARACTERS:
            break
    return "\n".join(sources)


def special_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Return the token ids that the tokenizer begins an input with.

    If there are none, return the beginning-of-sequence token, or an empty list if the tokenizer has no such token.
    """
    return beginning(tokenizer) or [token for token in [tokenizer.bos_token_id] if token is not None]


class TrainingWindows:
    """
    Windows of several kinds of text, which take turns. The seed determines the endless order.

    With probability 1/2, a window begins like an input of the tokenizer, with the beginning-of-sequence token if the
    tokenizer has this token. Otherwise the window begins in the middle of the text. Sinks occur on both.

    Args:
        texts: texts, of which the training parts are used.
        tokenizer: tokenizer, which decides how an input begins.
        long_window_tokens: length of a long window in tokens, or less if the text is shorter.
        batches_per_long: n if the last of every n batches is one long window, or 0 without long windows.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        tokenizer: PreTrainedTokenizerBase,
        long_window_tokens: int = 0,
        batches_per_long: int = 0,
    ) -> None:
        self.texts = [text.training for text in texts if text.training]
        self.start = special_start(tokenizer)
        self.long_window_tokens, self.batches_per_long = long_window_tokens, batches_per_long

    def training_batch(self, length: int, first: int, count: int, seed: int) -> torch.Tensor:
        """
        Return a batch of windows.

        Args:
            length: length of a window in tokens.
            first: index of the first window.
            count: number of windows.
            seed: random seed of the order.

        Returns:
            Token ids [count, length], or [1, long length] if the batch is a long window.
        """
        batch = first // count
        long = (batch + 1) // self.batches_per_long if self.batches_per_long else 0  # long windows up to this batch
        if long and (batch + 1) % self.batches_per_long == 0:
            return torch.tensor([self._window(self._turn(long - 1), self._long(long - 1, length), first, seed)])
        numbers = range(first, first + count)
        return torch.tensor(
            [self._window(self._turn(number - long * count), length, number, seed) for number in numbers]
        )

    def tokens(self, batches: int, length: int, count: int) -> int:
        """Return the number of tokens in the first batches, of `count` windows of `length` tokens."""
        long = batches // self.batches_per_long if self.batches_per_long else 0
        return (batches - long) * count * length + sum(self._long(number, length) for number in range(long))

    def _long(self, number: int, length: int) -> int:
        """Return the length in tokens of a long window, at least `length`."""
        return max(length, min(self.long_window_tokens, len(self._turn(number))))

    def _turn(self, number: int) -> list[int]:
        return self.texts[number % len(self.texts)]

    def _window(self, text: list[int], length: int, number: int, seed: int) -> list[int]:
        generator = random.Random(f"{seed} {number}")
        place = generator.randrange(max(1, len(text) - length))
        window = [text[index % len(text)] for index in range(place, place + length)]
        return ((self.start if generator.random() < 0.5 else []) + window)[:length]

"""The kinds of text that sinks are absorbed and the result is proven on, as tokens, some of each kind held out."""

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


# Of each text the last part is held out, and what is before it says when training is enough.
_HELD_OUT_SHARE, _VALIDATION_SHARE = 0.25, 0.05
# What there is without files.
_KINDS = ("prose", "documentation", "code", "chat", "sampled")
# What is read of the standard library, in characters.
_CODE_CHARACTERS = 600_000


@dataclass(frozen=True)
class Text:
    """
    Token ids of one kind of text: what may be trained on, what the result is measured on, and, of neither, what decides
    when training ends.
    """

    kind: str
    training: list[int]
    held_out: list[int]
    validation: list[int] = field(default_factory=list)


def default_texts(tokenizer: PreTrainedTokenizerBase, embeddings: int | None = None) -> list[Text]:
    """
    Return what every Python and this package bring along: a novel's chapters, Python's reference, its library's code.

    Raises:
        TokenizerError: if the tokenizer fails, or gives an id that is not below the number of `embeddings`.
    """
    contents = {"prose": prose(), "documentation": documentation(), "code": code()}
    return [as_text(kind, content, tokenizer, embeddings=embeddings) for kind, content in contents.items()]


def given_texts(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, embeddings: int | None = None) -> list[Text]:
    """
    Text files, each a kind of its own, by its name.

    Raises:
        EvaluationError: if one cannot be read.
        AbsorptionError: if two have one name.
        TokenizerError: if the tokenizer fails, or gives an id that is not below the number of `embeddings`.
    """
    check_texts(paths)
    return [as_text(path.stem, read_text(path)[0], tokenizer, str(path), embeddings) for path in paths]


def check_texts(paths: Sequence[Path]) -> None:
    """
    Check, before anything takes long, that text files can be read and told apart.

    Raises:
        EvaluationError: if one cannot be read.
        AbsorptionError: if two have one name, or one that of a kind that is there anyway.
    """
    for number, path in enumerate(paths):
        read_text(path)
        if path.stem in {*_KINDS, *(other.stem for other in paths[:number])}:
            raise AbsorptionError(f"{path}: another text has the name {path.stem}")


def as_text(
    kind: str,
    content: str,
    tokenizer: PreTrainedTokenizerBase,
    name: str | None = None,
    embeddings: int | None = None,
) -> Text:
    """
    Return a text in its three parts.

    Args:
        kind: the kind of text.
        content: the text.
        tokenizer: the model's.
        name: name of the text in errors; its kind if not given.
        embeddings: number of the model's embeddings, below which every id must be.
    """
    training, validation, held_out = (
        text_token_ids(tokenizer, content[section], name or f"the default text {kind}", embeddings)
        for section in _parts(len(content))
    )
    return Text(kind, training, held_out, validation)


def sampled_text(kind: str, sequences: Sequence[list[int]]) -> Text:
    """Sampled sequences, one after the other, each in one of the three parts."""
    training, validation, held_out = (
        [token for sequence in sequences[section] for token in sequence] for section in _parts(len(sequences))
    )
    return Text(kind, training, held_out, validation)


def _parts(length: int) -> tuple[slice, slice, slice]:
    """What is trained on, what decides when it is enough, and what is held out."""
    first, last = (int(length * (1 - share)) for share in (_HELD_OUT_SHARE + _VALIDATION_SHARE, _HELD_OUT_SHARE))
    return slice(first), slice(first, last), slice(last, None)


def prose() -> str:
    """Chapters 24 to 36 of Jane Austen's Pride and Prejudice (1813), which is in the public domain."""
    return (files("modeling_gated.absorption") / "prose.txt").read_text(encoding="utf-8")


def documentation() -> str:
    """Python's reference, whose topics have sections in common, with every paragraph once."""
    return "\n\n".join(dict.fromkeys(default_text().split("\n\n")))


def code() -> str:
    """Modules of the standard library, in an order drawn once."""
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
    """What the tokenizer begins an input with, or else its beginning-of-sequence token, if it has one."""
    return beginning(tokenizer) or [token for token in [tokenizer.bos_token_id] if token is not None]


class TrainingWindows:
    """
    Windows of several kinds of text, which take turns, in an endless order that a seed determines.

    One window in two, by chance, begins as the tokenizer begins an input, with its beginning-of-sequence token if it
    has one at all; the others begin as text goes on, since a sink may stand on either.

    Args:
        texts: of which the parts that may be trained on count.
        tokenizer: which says how an input begins.
        long_window_tokens: the last of every `batches_per_long` batches is one window of so many tokens, or of as many
            as its text has.
        batches_per_long: see there; none is if it is 0.
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
        """Windows number `first` to `first + count`, token ids [count, length], or a long one in their place."""
        batch = first // count
        long = (batch + 1) // self.batches_per_long if self.batches_per_long else 0  # how many there are up to here
        if long and (batch + 1) % self.batches_per_long == 0:
            return torch.tensor([self._window(self._turn(long - 1), self._long(long - 1, length), first, seed)])
        numbers = range(first, first + count)
        return torch.tensor(
            [self._window(self._turn(number - long * count), length, number, seed) for number in numbers]
        )

    def tokens(self, batches: int, length: int, count: int) -> int:
        """How many tokens the first batches have."""
        long = batches // self.batches_per_long if self.batches_per_long else 0
        return (batches - long) * count * length + sum(self._long(number, length) for number in range(long))

    def _long(self, number: int, length: int) -> int:
        """The tokens of a long window, where others have `length`."""
        return max(length, min(self.long_window_tokens, len(self._turn(number))))

    def _turn(self, number: int) -> list[int]:
        return self.texts[number % len(self.texts)]

    def _window(self, text: list[int], length: int, number: int, seed: int) -> list[int]:
        generator = random.Random(f"{seed} {number}")
        place = generator.randrange(max(1, len(text) - length))
        window = [text[index % len(text)] for index in range(place, place + length)]
        return ((self.start if generator.random() < 0.5 else []) + window)[:length]

"""
Tasks that only a model that uses its whole input can solve, in the style of RULER (arXiv 2404.06654): what is asked for
lies between sentences of a text that has nothing to do with it.
"""

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """
    One question about a long text.

    `instruction` goes before the text and `question` after it, `answer_prefix` begins the answer. `needles` are the
    sentences to hide, each with its depth in the text, from 0 to 1. `answers` are what has to be in the answer, of at
    most `max_new_tokens`; `hidden` are all the words that must be in no other place of the text.
    """

    instruction: str
    needles: tuple[tuple[float, str], ...]
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    hidden: tuple[str, ...]
    max_new_tokens: int

    def score(self, answer: str) -> float:
        """
        Return the share of `answers` that an answer holds as separate words: RULER's string match. Other words of the
        answer do not count against it.
        """
        matches = (re.search(rf"(?<![0-9A-Za-z]){re.escape(word)}(?![0-9A-Za-z])", answer) for word in self.answers)
        return sum(match is not None for match in matches) / len(self.answers)


def passkey(generator: random.Random, depth: float) -> Task:
    """Return a number of five digits that is said once (arXiv 2305.16300)."""
    key = _number(generator)
    return Task(
        instruction="There is important information hidden in the text below. Find it and memorize it.",
        needles=((depth, f"The pass key is {key}. Remember it. {key} is the pass key."),),
        question="What is the pass key?",
        answer_prefix="The pass key is",
        answers=(key,),
        hidden=(key,),
        max_new_tokens=16,
    )


def multi_key_needle(generator: random.Random, depth: float) -> Task:
    """Return the number of one of four words, where each has a number (RULER's multi-key needle in a haystack)."""
    words = _distinct(generator, 4, lambda: _letters(generator, 7).lower())
    numbers = _distinct(generator, 4, lambda: _number(generator, 7))
    depths = [depth, *(generator.random() for _ in range(3))]
    needles = tuple(
        (place, f"One of the special magic numbers for {word} is: {number}.")
        for place, word, number in zip(depths, words, numbers, strict=True)
    )
    return Task(
        instruction="Some special magic numbers are hidden within the following text. Memorize them.",
        needles=needles,
        question=f"What is the special magic number for {words[0]} mentioned in the text?",
        answer_prefix=f"The special magic number for {words[0]} mentioned in the text is",
        answers=(numbers[0],),
        hidden=(*words, *numbers),
        max_new_tokens=16,
    )


def variable_tracking(generator: random.Random, depth: float) -> Task:
    """
    Return the five variables that have a value, four of them through others, beside a chain of five with another value.

    `depth` is where the first of the chain stands; the others follow in order.
    """
    names = _distinct(generator, 10, lambda: _letters(generator, 5))
    values = _distinct(generator, 2, lambda: _number(generator))
    needles = []
    for chain, (value, start) in enumerate(zip(values, (depth, generator.random()), strict=True)):
        variables = names[5 * chain : 5 * chain + 5]
        depths = [start, *sorted(generator.uniform(start, 1.0) for _ in variables[1:])]
        said = [value, *(f"VAR {name}" for name in variables[:-1])]
        needles += [(place, f"VAR {name} = {what}") for place, name, what in zip(depths, variables, said, strict=True)]
    return Task(
        instruction="Memorize and track the chains of variable assignment hidden in the following text.",
        needles=tuple(needles),
        question=f"Find all variables that are assigned the value {values[0]} in the text above.",
        answer_prefix=(
            "According to the chains of variable assignment in the text above, 5 variables are assigned the value "
            f"{values[0]}, they are:"
        ),
        answers=tuple(names[:5]),
        hidden=(*names, *values),
        max_new_tokens=48,
    )


def draw(name: str, generator: random.Random, depth: float, text: str) -> Task:
    """Return a task of `TASKS` that hides nothing which is in the text already."""
    while True:
        task = TASKS[name](generator, depth)
        if not any(word in text for word in task.hidden):
            return task


TASKS: dict[str, Callable[[random.Random, float], Task]] = {
    "passkey": passkey,
    "multi_key_needle": multi_key_needle,
    "variable_tracking": variable_tracking,
}


def _number(generator: random.Random, digits: int = 5) -> str:
    return str(generator.randrange(10 ** (digits - 1), 10**digits))


def _letters(generator: random.Random, count: int) -> str:
    return "".join(generator.choices(string.ascii_uppercase, k=count))


def _distinct(generator: random.Random, count: int, make: Callable[[], str]) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        if (word := make()) not in words:
            words.append(word)
    return words

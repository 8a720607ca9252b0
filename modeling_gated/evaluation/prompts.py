"""Prompts of a given number of tokens, built so that what is asked for is really in them."""

from bisect import bisect_right
from collections.abc import Sequence
from textwrap import wrap

from transformers import PreTrainedTokenizerBase

from modeling_gated.checkpoints.tokenization import chat_text, encode, tokenizer_name
from modeling_gated.errors import EvaluationError, TokenizerError

from .tasks import Task
from .text import beginning


_LINE = 200


def build_prompt(
    task: Task, lines: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, *, chat: bool
) -> list[int]:
    """
    Return token ids of a prompt. With its answer it takes at most `length` tokens, and at most one line of text less.

    Nothing is truncated: the text is shortened by lines until all fits. The whole prompt is tokenized at once, so
    that needles are as the model would see them in a text, and decoded again: each must still be there.

    Args:
        task: what to hide and to ask.
        lines: those of the text, as `lines_of` gives them; repeated if there are too few.
        tokenizer: the model's.
        length: tokens of prompt and answer.
        chat: whether the prompt is a user's message in the tokenizer's chat template.

    Raises:
        EvaluationError: if not even the question fits, or the tokenizer or the chat template drops the text or changes
            what is hidden.
        TokenizerError: if the tokenizer or the chat template fails.
    """
    budget = length - task.max_new_tokens

    def tokens_of(count: int) -> list[int]:
        return _tokenize(_prompt(task, lines, count), tokenizer, chat, task.answer_prefix)

    question = len(tokens_of(0))
    if question > budget:
        raise EvaluationError(f"length {length}: question and answer alone take {question + task.max_new_tokens}")
    most = 1
    while len(tokens_of(most)) <= budget:
        most *= 2
        if most > budget:  # no line is blank, so each should give a token
            place, advice = ("chat template", ", or ask in plain text: chat=False") if chat else ("tokenizer", "")
            raise EvaluationError(
                f"{tokenizer_name(tokenizer)}: its {place} must keep the text of a prompt, got {question} tokens for "
                f"any text; correct the {place}{advice}"
            )
    count = bisect_right(range(most), budget, key=lambda count: len(tokens_of(count))) - 1
    input_ids = tokens_of(count)
    decoded = tokenizer.decode(input_ids)
    if lost := [needle for _, needle in task.needles if needle not in decoded]:
        raise EvaluationError(f"the tokenizer does not keep {lost[0]!r}")
    return input_ids


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, long ones broken, so that prompts can be filled and needles spread evenly."""
    broken = (wrap(line, _LINE) if len(line) > _LINE else [line] for line in text.splitlines() if line.strip())
    return [line for lines in broken for line in lines]


def _prompt(task: Task, lines: Sequence[str], count: int) -> str:
    chosen = [lines[number % len(lines)] for number in range(count)]
    places = sorted((min(int(depth * (count + 1)), count), number) for number, (depth, _) in enumerate(task.needles))
    for place, number in reversed(places):
        chosen.insert(place, task.needles[number][1])
    return "\n".join([task.instruction, "", *chosen, "", task.question])


def _tokenize(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool, answer_prefix: str) -> list[int]:
    """Return token ids, never truncated. A chat template writes the special tokens itself, so that none comes twice."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            prompt = chat_text(tokenizer, messages, add_generation_prompt=True)
        except TokenizerError as error:
            raise TokenizerError(f"{error}, or ask in plain text: chat=False") from None
    else:
        prompt = f"{prompt}\n"
    ids = encode(tokenizer, f"{prompt}{answer_prefix}", "a prompt")
    return ids if chat else beginning(tokenizer) + ids

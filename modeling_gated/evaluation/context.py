"""Evaluation of long contexts: loss by position, and tasks whose answer lies somewhere in the input."""

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_gated.checkpoints.loading import checked_end
from modeling_gated.checkpoints.tokenization import check_token_ids, text_token_ids
from modeling_gated.defaults import CHUNK_SIZE, CONTEXT_SAMPLES, CONTEXT_TASKS, CONTEXT_WINDOWS, SEED
from modeling_gated.errors import EvaluationError

from .position_loss import loss_by_position
from .prompts import build_prompt, lines_of
from .tasks import TASKS, draw
from .text import beginning, read_text
from .windows import spread_windows


LOSS = "loss"


@dataclass(frozen=True)
class PositionLoss:
    """
    Mean loss, in nats per token, of the tokens at positions `start` to `end` (exclusive) of all windows; None if it is
    not finite.
    """

    start: int
    end: int
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class TaskScore:
    """Mean score, from 0 to 1, of `samples` prompts of at most `length` tokens; `prompt_tokens` is their mean."""

    task: str
    length: int
    samples: int
    prompt_tokens: float
    score: float


@dataclass(frozen=True)
class ContextEvaluation:
    """
    What `evaluate_context` found of one model, and all that it depends on.

    `beyond` are the lengths for which the model was not made (more than its `max_position_embeddings`). `text_tokens`
    and `text_characters` tell how its tokenizer takes the text: losses of models that differ in them do not compare.
    """

    name: str
    dtype: str
    max_position_embeddings: int | None
    rope_parameters: dict[str, Any] | None
    lengths: tuple[int, ...]
    beyond: tuple[int, ...]
    text: str
    text_tokens: int
    text_characters: int
    chat_template: bool
    seed: int
    windows: int
    losses: tuple[PositionLoss, ...]
    scores: tuple[TaskScore, ...]
    seconds: float


def evaluate_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    lengths: Sequence[int],
    tasks: Sequence[str] = CONTEXT_TASKS,
    text: Path | None = None,
    windows: int = CONTEXT_WINDOWS,
    samples: int = CONTEXT_SAMPLES,
    chat: bool | None = None,
    seed: int = SEED,
    chunk_size: int = CHUNK_SIZE,
    progress: bool = False,
) -> ContextEvaluation:
    """
    Measure how well a causal language model uses inputs of some lengths.

    `"loss"` is the mean loss of the tokens between each length and the one before it, over windows of the text as
    long as the longest. The tasks hide something in the text and ask for it; each prompt is as long as can be within
    its length, answer included, none is truncated, and the same (`seed`) for every model with the same tokenizer.
    Answers are greedy, whatever the checkpoint's generation config says. Everything goes through the model in chunks,
    so that memory is that of the model, its cache and one chunk.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        name: what to call the model.
        lengths: in tokens; sorted here.
        tasks: `"loss"` and names of `TASKS`.
        text: a text file, UTF-8; Python's language reference if not given.
        windows: windows of the text to take losses of.
        samples: prompts per task and length, with depths spread evenly over the text.
        chat: whether prompts are messages in the tokenizer's chat template; if not given, whether it has one.
        seed: of what is hidden, and where.
        chunk_size: tokens per forward pass.
        progress: show a progress bar, on a terminal.

    Raises:
        EvaluationError: if a setting is out of range, the text too short for the windows, or a prompt cannot be built.
        TokenizerError: if the tokenizer or its chat template fails, or gives ids that the model has no embeddings for.
        ConversionError: if the generation config's `eos_token_id` is no token id.
    """
    started = time.perf_counter()
    lengths = tuple(sorted(lengths))
    check_settings(lengths, tasks, windows=windows, samples=samples, chunk_size=chunk_size)
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise EvaluationError(f"{name}: its tokenizer has no chat template")
    chat = has_template if chat is None else chat
    chunk_size = min(chunk_size, lengths[-1])  # torch takes no number of more than 64 bits
    content, text_name = read_text(text)
    input_ids = text_token_ids(tokenizer, content, text_name, model)
    longest = getattr(model.config, "max_position_embeddings", None)

    asked = [task for task in tasks if task != LOSS]
    lines = lines_of(content)
    cut: list[torch.Tensor] = []
    if LOSS in tasks:
        cut = spread_windows(input_ids, lengths[-1], windows, beginning(tokenizer))
        if len(cut) < windows:
            raise EvaluationError(
                f"{text_name}: {windows} windows of {lengths[-1]} tokens are more than the {len(input_ids)} tokens of "
                "the text; use a longer text, or fewer or shorter windows"
            )
        check_token_ids(tokenizer, cut[0].tolist(), "the beginning of an input", model)
    for task in asked:  # before anything takes long
        prompt = build_prompt(draw(task, random.Random(seed), 0.5, content), lines, tokenizer, lengths[0], chat=chat)
        check_token_ids(tokenizer, prompt, "the chat template" if chat else "a prompt", model)
    if asked:
        checked_end(getattr(model.generation_config, "eos_token_id", None), f"{name}: generation_config")
    total = windows * lengths[-1] * (LOSS in tasks) + samples * len(asked) * sum(lengths)
    with tqdm(total=total, desc=name, unit=" tokens", unit_scale=True, disable=None if progress else True) as bar:
        losses: tuple[PositionLoss, ...] = ()
        if LOSS in tasks:
            losses = _losses(model, cut, lengths, chunk_size, bar)
        with _plain_generation(model):
            scores = tuple(
                _score(model, tokenizer, task, length, content, lines, samples, chat, seed, chunk_size, bar)
                for task in asked
                for length in lengths
            )
    return ContextEvaluation(
        name=name,
        dtype=str(model.dtype).removeprefix("torch."),
        max_position_embeddings=longest,
        rope_parameters=getattr(model.config, "rope_parameters", None),
        lengths=lengths,
        beyond=tuple(length for length in lengths if longest is not None and length > longest),
        text=text_name,
        text_tokens=len(input_ids),
        text_characters=len(content),
        chat_template=chat,
        seed=seed,
        windows=windows,
        losses=losses,
        scores=scores,
        seconds=time.perf_counter() - started,
    )


def check_settings(lengths: Sequence[int], tasks: Sequence[str], **counts: int) -> None:
    """
    Check what can be checked without a model.

    Raises:
        EvaluationError: for lengths or tasks that are none or come twice, and for counts below 1.
    """
    if not lengths or min(lengths) < 2 or len(set(lengths)) < len(lengths):
        raise EvaluationError(f"lengths must be different numbers of tokens, each at least 2, got {list(lengths)}")
    if unknown := [task for task in tasks if task not in (LOSS, *TASKS)]:
        raise EvaluationError(f"tasks must be among {', '.join((LOSS, *TASKS))}, got {unknown[0]!r}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise EvaluationError(f"tasks must be different and at least one, got {list(tasks)}")
    for field, value in counts.items():
        if value < 1:
            raise EvaluationError(f"{field} must be at least 1, got {value}")


def _losses(
    model: PreTrainedModel, windows: list[torch.Tensor], lengths: tuple[int, ...], chunk_size: int, bar: tqdm
) -> tuple[PositionLoss, ...]:
    losses = torch.stack(
        [loss_by_position(model, window, chunk_size=chunk_size, advance=bar.update) for window in windows]
    )
    buckets = []
    for start, end in pairwise((0, *lengths)):
        of_range = losses[:, max(start - 1, 0) : end - 1]  # element i is the loss of the token at position i + 1
        mean = of_range.double().mean().item()
        buckets.append(PositionLoss(max(start, 1), end, of_range.numel(), mean if math.isfinite(mean) else None))
    return tuple(buckets)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """
    Put a checkpoint's own generation config aside, but for the tokens that end an answer: a repetition_penalty, for
    one, would forbid the very digits that are asked for.
    """
    settings = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = settings


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    length: int,
    text: str,
    lines: list[str],
    samples: int,
    chat: bool,
    seed: int,
    chunk_size: int,
    bar: tqdm,
) -> TaskScore:
    scores, sizes = [], []
    for sample in range(samples):
        generator = random.Random(f"{seed} {name} {length} {sample}")
        task = draw(name, generator, (sample + 0.5) / samples, text)
        first = generator.randrange(len(lines))
        prompt = build_prompt(task, lines[first:] + lines[:first], tokenizer, length, chat=chat)
        check_token_ids(tokenizer, prompt, f"a prompt of {name}", model)
        input_ids = torch.tensor([prompt], device=model.device)
        output = model.generate(  # type: ignore[operator]  # it may be any class of Transformers' that has it
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            prefill_chunk_size=chunk_size,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        answer = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
        scores.append(task.score(str(answer)))
        sizes.append(len(prompt))
        bar.update(length)
    return TaskScore(name, length, samples, sum(sizes) / samples, sum(scores) / samples)

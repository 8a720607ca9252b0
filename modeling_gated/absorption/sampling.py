"""Text sampled from the source model, whose distribution the edited model has to keep."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_gated.checkpoints.tokenization import chat_text, check_token_ids, encode, tokenizer_name
from modeling_gated.errors import TokenizerError
from modeling_gated.inspection.watching.inspecting import input_device


# Sequences per batch.
_BATCH = 64
# Maximum tokens of a question, of an answer, and of a text that starts from one token.
_QUESTION, _ANSWER, _TEXT = 64, 320, 384
_MARK = "\u2402"


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, *, seed: int, progress: bool = False
) -> list[list[int]]:
    """
    Sample text from a model at temperature 1 (Liu et al., arXiv 2305.17888).

    Every other sequence starts from the beginning-of-sequence token. The others, and all sequences of a tokenizer
    without such a token, start from a random token.

    Args:
        model: causal language model, in evaluation mode, on its device.
        tokenizer: tokenizer of the model.
        tokens: minimum number of tokens to return.
        seed: random seed.
        progress: show a progress bar, on a terminal.

    Returns:
        Sequences of token ids without special tokens.

    Raises:
        TokenizerError: if the model has no embedding for the beginning-of-sequence token.
    """
    special = _special(tokenizer)
    if tokenizer.bos_token_id is not None:
        check_token_ids(tokenizer, [tokenizer.bos_token_id], "the beginning of an input", model)
    plain = [token for token in range(min(len(tokenizer), model.config.vocab_size)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    sequences: list[list[int]] = []
    with _seeded(model, seed), _bar("sampling text", tokens, progress) as bar:
        while (done := sum(map(len, sequences))) < tokens:
            drawn = torch.randint(len(plain), (_batch(tokens - done, _TEXT),), generator=generator).tolist()
            starts = [[plain[index]] for index in drawn]
            if tokenizer.bos_token_id is not None:
                starts[::2] = [[tokenizer.bos_token_id]] * len(starts[::2])
            for start, more in zip(starts, _continue(model, starts, _TEXT, special), strict=True):
                text = [token for token in start if token not in special] + more
                sequences.append(text)
            bar.update(min(tokens, sum(map(len, sequences))) - done)
    return [text for text in sequences if text]


def sample_chats(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, *, seed: int, progress: bool = False
) -> list[list[int]]:
    """
    Sample conversations: the model writes a user's question into its chat template (Xu et al., arXiv 2406.08464) and
    then answers the question.

    Args:
        model: causal language model, in evaluation mode, on its device.
        tokenizer: tokenizer of the model.
        tokens: minimum number of tokens to return.
        seed: random seed.
        progress: show a progress bar, on a terminal.

    Returns:
        Conversations as token ids, template included. Empty if the tokenizer has no chat template, or if the template
        cannot be used for the reason that `why_no_chats` returns.

    Raises:
        TokenizerError: if the model has no embeddings for the tokens of the template.
    """
    try:
        around = _template(tokenizer)
    except TokenizerError:
        return []
    if around is None:
        return []
    before, between, after = around
    check_token_ids(tokenizer, [*before, *between, *after], "the chat template", model)
    special = _special(tokenizer)
    chats: list[list[int]] = []
    with _seeded(model, seed), _bar("sampling chats", tokens, progress) as bar:
        while (done := sum(map(len, chats))) < tokens:
            questions = _continue(model, [before] * _batch(tokens - done, _ANSWER), _QUESTION, special)
            # Empty questions are kept, so that the loop ends for every model.
            starts = [before + question + between for question in questions]
            answers = _continue(model, starts, _ANSWER, special)
            chats += [start + answer + after for start, answer in zip(starts, answers, strict=True)]
            bar.update(min(tokens, sum(map(len, chats))) - done)
    return chats


def _batch(tokens: int, of_a_sequence: int) -> int:
    """Return the number of sequences to sample per batch, at least 2."""
    return min(_BATCH, max(2, math.ceil(tokens / of_a_sequence)))


def why_no_chats(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the reason why a chat template cannot be used for sampling; None if it can, or if there is no template."""
    try:
        _template(tokenizer)
    except TokenizerError as error:
        return str(error)
    return None


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all special tokens, including special tokens without a role such as bos or eos."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return added | set(tokenizer.all_special_ids)


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]] | None:
    """
    Return the template's token ids before a question, between question and answer, and after the answer.

    None if the tokenizer has no chat template.

    Raises:
        TokenizerError: if the template fails, or does not keep a question and its answer.
    """
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
    whole = chat_text(tokenizer, chat)
    if whole.count(_MARK) != 2 or whole.startswith(_MARK):
        raise TokenizerError(
            f"{tokenizer_name(tokenizer)}: its chat template must keep a question and its answer, each "
            f"once and with text before the question, got {whole!r}"
        )
    before, between, after = whole.split(_MARK)
    ids = [encode(tokenizer, text, "the chat template") for text in (before, between, after)]
    return ids[0], ids[1], ids[2]


@torch.no_grad()
def _continue(model: Any, starts: Sequence[list[int]], tokens: int, stop: set[int]) -> list[list[int]]:
    """Sample a continuation of each start, up to the first special token."""
    padded = pad_sequence([torch.tensor(start) for start in starts], batch_first=True, padding_side="left")
    lengths = torch.tensor([len(start) for start in starts])
    mask = torch.arange(padded.shape[1]) >= padded.shape[1] - lengths[:, None]
    device = input_device(model)
    written = model.generate(
        padded.to(device),
        attention_mask=mask.long().to(device),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(stop),
        pad_token_id=min(stop, default=0),
    )
    return [_until(row, stop) for row in written[:, padded.shape[1] :].tolist()]


def _until(tokens: list[int], stop: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seed torch inside the context, and restore its generators afterwards."""
    device = input_device(model)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def _bar(title: str, tokens: int, progress: bool) -> Any:
    return tqdm(desc=title, total=tokens, unit="token", disable=None if progress else True)

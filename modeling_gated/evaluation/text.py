"""A text that models are measured on, and its windows of tokens."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modeling_gated.checkpoints.tokenization import encode
from modeling_gated.default_text import DEFAULT_TEXT_NAME, default_text
from modeling_gated.errors import EvaluationError


def read_text(path: Path | None) -> tuple[str, str]:
    """A text file, UTF-8, or Python's language reference; and what to call it."""
    if path is None:
        return default_text(), DEFAULT_TEXT_NAME
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if not content.strip():
        raise EvaluationError(f"{path}: is empty")
    return content, path.name


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts it before an input. (Some also put an end after it.)"""
    ids = encode(tokenizer, "", "the beginning of an input", add_special_tokens=True)
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def windows_of(
    input_ids: list[int], tokenizer: PreTrainedTokenizerBase, length: int, count: int, text_name: str = "text"
) -> list[torch.Tensor]:
    """
    Return windows of a text, spread evenly over it, each beginning as the tokenizer begins an input.

    Raises:
        EvaluationError: if the text, called `text_name`, has fewer tokens.
    """
    begin = beginning(tokenizer)
    own = length - len(begin)
    if own * count > len(input_ids):
        raise EvaluationError(
            f"{text_name}: {count} windows of {length} tokens are more than the {len(input_ids)} tokens of the text; "
            "use a longer text, or fewer or shorter windows"
        )
    step = len(input_ids) // count
    return [torch.tensor(begin + input_ids[first * step : first * step + own]) for first in range(count)]

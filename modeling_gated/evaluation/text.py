"""A text that models are measured on."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modeling_gated.checkpoints.tokenization import encode
from modeling_gated.default_text import DEFAULT_TEXT_NAME, default_text
from modeling_gated.errors import EvaluationError


def read_text(path: Path | None) -> tuple[str, str]:
    """Return a text file, UTF-8, or Python's language reference; and what to call it."""
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
    """Return the beginning-of-sequence token if the tokenizer puts it before an input, otherwise nothing."""
    ids = encode(tokenizer, "", "the beginning of an input", add_special_tokens=True)
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []

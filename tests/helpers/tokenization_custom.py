"""A tokenizer that checkpoints carry as code, with a result unlike that of any class of Transformers."""

from typing import Any

from transformers import PreTrainedTokenizerFast


class CustomTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text: str, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().__call__(text[::-1], **kwargs)

"""A tokenizer of three words."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_word_tokenizer(directory: Path, first: int = 0) -> None:
    """Save a tokenizer that knows a, b and [UNK] as the ids `first` and the two after it."""
    vocabulary = {"a": first, "b": first + 1, "[UNK]": first + 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)

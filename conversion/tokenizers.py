"""
The tokenizer of a result, which must give the source's ids.

Transformers picks a tokenizer's class by the `model_type` of config.json, which conversion changes. So the result's
tokenizer_config.json names the class that Transformers picks for the source.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from modeling_gated.checkpoints.checkpoint import Checkpoint
from modeling_gated.checkpoints.files import read_bytes, resolve
from modeling_gated.default_text import DEFAULT_TEXT_NAME, default_text
from modeling_gated.errors import ConversionError

from .quiet import quiet_transformers
from .tokenizer_texts import CHATS, TEXTS


TOKENIZER_CONFIG_NAME, TOKENIZER_NAME = "tokenizer_config.json", "tokenizer.json"
_ANY_BACKEND = "TokenizersBackend"  # Transformers' class that takes tokenizer.json as it is
_MAX_SPECIAL_TOKENS = 64
_TOKENIZER_FILE = re.compile(
    r"^(?:tokenizer(?!_config\.json)|tokenization|vocab|merges|tekken|spiece|sentencepiece)[^/]*$"
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CLASS_DEFAULTS = (
    *_SPECIAL_TOKENS,
    *("padding_side", "truncation_side", "clean_up_tokenization_spaces", "split_special_tokens"),
)
_ATTRIBUTES = (
    *_SPECIAL_TOKENS,
    *("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "all_special_tokens", "extra_special_tokens"),
    *("padding_side", "truncation_side", "model_max_length", "model_input_names", "clean_up_tokenization_spaces"),
    *("split_special_tokens", "chat_template", "response_template"),
)


@dataclass(frozen=True)
class TokenizerComparison:
    """
    Two checkpoints' tokenizers, as `AutoTokenizer` loads them without running their code.

    `texts` is the number of texts, chats included, of which the ids were compared. `differences` says in words how the
    second one differs. `why_not` says why they were not compared; the other two are then empty.
    """

    texts: int
    differences: tuple[str, ...]
    why_not: str | None = None

    def summary(self) -> str:
        """Return the result in words."""
        if self.why_not is not None:
            return f"not compared: {self.why_not}"
        if self.differences:
            return f"differs: {'; '.join(self.differences[:3])}"
        return f"the source's: equal ids of {self.texts} texts and chats"


def load_tokenizer(directory: Path, repo_id: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer as `checkpoints.tokenization` does, without warnings, which loading again would repeat."""
    # Here, as the rest of a conversion needs no model or tokenizer.
    from modeling_gated.checkpoints.tokenization import load_tokenizer

    with quiet_transformers():
        return load_tokenizer(directory, repo_id)


def tokenizer_changes(
    original: PreTrainedTokenizerBase, directory: Path, names: Iterable[str], config: str
) -> tuple[dict[str, bytes] | None, tuple[str, ...]]:
    """
    Find the tokenizer files that must change for a gated checkpoint to have the source's tokenizer.

    Nothing has to change where Transformers picks the same class for both. Otherwise tokenizer_config.json names the
    class that it picks for the source; if that alone is not enough, tokenizer.json is written as that class made it.

    Args:
        original: the source's tokenizer.
        directory: where the checkpoint's files are.
        names: names of the files that a tokenizer may read.
        config: text of the gated checkpoint's config.json.

    Returns:
        The content of the files to change, by their names; None if the tokenizers differ whatever the files say, and
        then how they differ.
    """
    kept = list(names)
    problems: tuple[str, ...] = ()
    for changes in _candidates(directory / TOKENIZER_CONFIG_NAME, original):
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder)
            link_files(directory, trial, [name for name in kept if name not in changes])
            (trial / CONFIG_NAME).write_text(config)
            for name, content in changes.items():
                (trial / name).write_bytes(content)
            try:
                loaded = load_tokenizer(trial)
            except ConversionError as error:
                problems = (str(error).replace(folder, str(directory)),)
                continue
        problems = differences(original, loaded)
        if not problems and (type(loaded) is type(original) or TOKENIZER_NAME in changes):
            return changes, ()
    return None, problems


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file's name is one of a tokenizer's."""
    return _TOKENIZER_FILE.search(name) is not None


def _candidates(path: Path, original: PreTrainedTokenizerBase) -> Iterator[dict[str, bytes]]:
    """Yield changed files, from none to a tokenizer.json of our own."""
    raw: Any = {}
    with suppress(ValueError, RecursionError):  # Transformers has read it; of a repeated key, it takes the last value
        raw = json.loads(read_bytes(path)) if path.is_file() else {}
    raw = raw if isinstance(raw, dict) else {}
    # Code in the checkpoint would run with trust_remote_code=True, which gated models need without this package.
    without_code = {name: value for name, value in raw.items() if name != "auto_map"}
    if without_code == raw:
        yield {}
    named = {"tokenizer_class": type(original).__name__}
    yield {TOKENIZER_CONFIG_NAME: _json(without_code | named)}
    if (backend := _backend(original)) is not None:
        # Defaults of the class, as the padding's side.
        settings = {name: getattr(original, name, None) for name in _CLASS_DEFAULTS}
        settings = {name: value for name, value in settings.items() if isinstance(value, str | bool)}
        tokenizer_config = _json(without_code | settings | {"tokenizer_class": _ANY_BACKEND})
        yield {TOKENIZER_CONFIG_NAME: tokenizer_config, TOKENIZER_NAME: backend.encode()}
    if without_code != raw:
        yield {TOKENIZER_CONFIG_NAME: _json(raw | named)}


def compare_tokenizers(source: Path, result: Path, repo_id: str | None) -> TokenizerComparison:
    """
    Compare the tokenizers of two checkpoints: on texts, chats and special tokens, and in their settings.

    Args:
        source: the directory of the first one.
        result: that of the second one.
        repo_id: the first one's name on the hub.
    """
    try:
        original = load_tokenizer(source, repo_id)
    except ConversionError as error:
        return TokenizerComparison(0, (), str(error))
    try:
        loaded = load_tokenizer(result)
    except ConversionError as error:
        return TokenizerComparison(0, (str(error),))
    texts = (*TEXTS, *_chats(original))
    problems = differences(original, loaded, texts)
    return TokenizerComparison(len(_texts(original, texts)), problems)


def differences(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, texts: Iterable[str] = TEXTS
) -> tuple[str, ...]:
    """Return in words how a second tokenizer differs from a first one in ids, decoded texts and settings."""
    problems = []
    for name in _ATTRIBUTES:
        ours, theirs = (str(getattr(tokenizer, name, None)) for tokenizer in (first, second))
        if ours != theirs:
            problems.append(f"{name} is {theirs:.80}, not {ours:.80}")
    if first.get_vocab() != second.get_vocab():
        problems.append("its vocabulary is another")
    for text in _texts(first, texts):
        ours, theirs = (_encoded(tokenizer, text) for tokenizer in (first, second))
        if ours != theirs:
            problems.append(f"{text[:40]!r} has other ids or another decoded text")
    if not problems and _backend(first) != _backend(second):
        problems.append("its normalizer, pre-tokenizer, model or decoder is another")
    return tuple(problems)


def _chats(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return chats as the tokenizer's template writes them, once: a template may write the time of day."""
    from modeling_gated.checkpoints.tokenization import chat_text

    texts = []
    for chat in CHATS:
        with suppress(ConversionError):  # there is no template, or it refuses this chat
            texts.append(chat_text(tokenizer, chat, add_generation_prompt=True))
    return texts


def _texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    # Mistral's own backend has no added vocabulary.
    added = [*tokenizer.all_special_tokens, *getattr(tokenizer, "get_added_vocab", dict)()]
    special = list(dict.fromkeys(str(token) for token in added))[:_MAX_SPECIAL_TOKENS]
    return [*texts, *(f"a {token} b{token}c  {token}" for token in special)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a fast tokenizer as the text of a tokenizer.json; None if it has no such form."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if hasattr(backend, "to_str") else None


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    try:
        ids = tokenizer(text)["input_ids"]
        return ids, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.decode(ids)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # of both tokenizers, it is no difference; panics are not Exceptions
        return type(error).__name__


def link_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Make links in a directory to files of another one; copies where links are not allowed."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.symlink((source / name).resolve(), target / name)
        except OSError:  # Windows, where links need a privilege
            shutil.copy(source / name, target / name)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def token_ids(
    source: Checkpoint, text: str | os.PathLike | None, count: int, vocab_size: int
) -> tuple[torch.Tensor, str]:
    """Return token ids [count] of a text, and what to call it."""
    tokenizer_file = source.directory / "tokenizer.json"
    if not tokenizer_file.exists():
        if text is not None:
            raise ConversionError(f"{tokenizer_file}: no such file, so {text} cannot be tokenized")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (count,), generator=generator), "random numbers (there is no tokenizer.json)"
    if text is None:
        content, name = default_text()[: 100 * count], DEFAULT_TEXT_NAME
    else:
        with open(text, encoding="utf-8", errors="replace") as file:
            content, name = file.read(100 * count), Path(text).name
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(resolve(source.directory, "tokenizer.json")))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.encode(content).ids[:count]
    except (ConversionError, KeyboardInterrupt):
        raise
    except BaseException as error:  # tokenizers has no error of its own, and its panics are not Exceptions
        raise ConversionError(f"{tokenizer_file}: cannot tokenize {name}: {error}") from None
    if not ids or max(ids) >= vocab_size:
        raise ConversionError(f"{tokenizer_file}: {name} gives no tokens within the vocabulary of {vocab_size}")
    return torch.tensor(ids), name

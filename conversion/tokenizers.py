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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, logging

from modeling_gated.default_text import DEFAULT_TEXT_NAME, default_text

from .checkpoint import Checkpoint
from .errors import ConversionError
from .files import MAX_CONFIG_BYTES, read_bytes, read_json, resolve
from .tokenizer_texts import CHATS, TEXTS


TOKENIZER_CONFIG_NAME, TOKENIZER_NAME = "tokenizer_config.json", "tokenizer.json"
_ANY_BACKEND = "TokenizersBackend"  # Transformers' class that takes tokenizer.json as it is
_MAX_SPECIAL_TOKENS = 64
_TOKENIZER_FILE = re.compile(r"^(?:tokenizer|tokenization|vocab|merges|tekken|spiece|sentencepiece)[^/]*$")
_ATTRIBUTES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
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
    """Load a tokenizer as `modeling_gated.tokenization` does, without warnings, which loading again would repeat."""
    # Here, as the rest of a conversion needs no model or tokenizer.
    from modeling_gated.tokenization import load_tokenizer

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load_tokenizer(directory, repo_id)
    finally:
        logging.set_verbosity(level)


def tokenizer_changes(
    checkpoint: Checkpoint, side_files: Collection[str], config: str, repo_id: str | None
) -> tuple[dict[str, bytes], str | None]:
    """
    Return the tokenizer files of a result that must differ from the source's, with their content; and why the source's
    tokenizer was not looked at, if it has files and cannot be loaded.

    Nothing has to differ where Transformers picks the same class for both. Otherwise tokenizer_config.json names the
    class that it picks for the source; if that alone is not enough, tokenizer.json is written as that class made it.

    Args:
        checkpoint: the source, or a checkpoint with its config.json and tokenizer files.
        side_files: names of the files that come along.
        config: the result's config.json.
        repo_id: the source's name on the hub.

    Raises:
        ConversionError: if the result would tokenize otherwise, whatever its files say.
    """
    try:
        original = load_tokenizer(checkpoint.directory, repo_id)
    except ConversionError as error:  # there is none, or it has code of its own: the result has the same files
        return {}, str(error) if any(_TOKENIZER_FILE.search(name) for name in side_files) else None
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        link_files(checkpoint.directory, directory, side_files)
        (directory / CONFIG_NAME).write_text(config)
        found: tuple[str, ...] = ()
        for changes in _candidates(checkpoint.directory / TOKENIZER_CONFIG_NAME, original):
            for name, content in changes.items():
                (directory / name).unlink(missing_ok=True)
                (directory / name).write_bytes(content)
            try:
                loaded = load_tokenizer(directory)
            except ConversionError as error:
                found = (str(error),)
                continue
            if not (found := differences(original, loaded)) and (
                type(loaded) is type(original) or TOKENIZER_NAME in changes
            ):
                return changes, None
    raise ConversionError(
        f"{checkpoint.directory}: the tokenizer of the result would differ: {'; '.join(found[:3])}; save it with "
        "AutoTokenizer.from_pretrained(SOURCE).save_pretrained(SOURCE), then convert again"
    )


def _candidates(path: Path, original: PreTrainedTokenizerBase) -> Iterator[dict[str, bytes]]:
    """Yield changed files, from none to a tokenizer.json of our own."""
    raw = read_json(path, MAX_CONFIG_BYTES) if path.is_file() else {}
    # Code in the checkpoint would run with trust_remote_code=True, which gated models need without this package.
    without_code = {name: value for name, value in raw.items() if name != "auto_map"}
    if without_code == raw:
        yield {}
    named = {"tokenizer_class": type(original).__name__}
    yield {TOKENIZER_CONFIG_NAME: _json(without_code | named)}
    if without_code != raw:
        yield {TOKENIZER_CONFIG_NAME: _json(raw | named)}
    if (backend := _backend(original)) is not None:
        tokenizer_config = _json(without_code | {"tokenizer_class": _ANY_BACKEND})
        yield {TOKENIZER_CONFIG_NAME: tokenizer_config, TOKENIZER_NAME: backend.encode()}


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
    return TokenizerComparison(len(_texts(original)) + len(CHATS), differences(original, loaded))


def differences(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return in words how a second tokenizer differs from a first one in ids, decoded texts, chats and settings."""
    found = []
    for name in _ATTRIBUTES:
        ours, theirs = (str(getattr(tokenizer, name, None)) for tokenizer in (first, second))
        if ours != theirs:
            found.append(f"{name} is {theirs:.80}, not {ours:.80}")
    if _vocabulary(first) != _vocabulary(second):
        found.append("its vocabulary is another")
    for text in _texts(first):
        ours, theirs = (_encoded(tokenizer, text) for tokenizer in (first, second))
        if ours != theirs:
            found.append(f"{text[:40]!r} has other ids or another decoded text")
    for chat in CHATS:
        ours, theirs = (_rendered(tokenizer, chat) for tokenizer in (first, second))
        if ours != theirs:
            found.append(f"a chat of {len(chat)} has other ids")
    if not found and _backend(first) != _backend(second):
        found.append("its normalizer, pre-tokenizer, model or decoder is another")
    return tuple(found)


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # Mistral's own backend has no added vocabulary.
    added = [*tokenizer.all_special_tokens, *getattr(tokenizer, "get_added_vocab", dict)()]
    special = list(dict.fromkeys(str(token) for token in added))[:_MAX_SPECIAL_TOKENS]
    return [*TEXTS, *(f"a {token} b{token}c  {token}" for token in special)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a fast tokenizer as the text of a tokenizer.json; None if it has no such form."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if hasattr(backend, "to_str") else None


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    try:
        return tokenizer.get_vocab()
    except NotImplementedError:
        return None


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    try:
        ids = tokenizer(text)["input_ids"]
        return ids, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.decode(ids)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # of both tokenizers, it is no difference; panics are not Exceptions
        return type(error).__name__


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # no template, or one that refuses this chat
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
    """Token ids [count] of a text, and what to call it."""
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

"""Tokenizers of checkpoints: loading one, checking its token ids against a model, writing its chats."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_gated.registration  # noqa: F401 - makes AutoTokenizer know gated_llama
from modeling_gated.conversion.errors import ConversionError


_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_JSON_FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json")
_WHAT_TO_DO = "copy the tokenizer files again from the model that the checkpoint was made from"


class TokenizerError(ConversionError):
    """A tokenizer or a chat template that cannot be used with its model. The message is one line."""


def load_tokenizer(directory: Path, repo_id: str | None = None) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a checkpoint. No code of the checkpoint is run.

    Args:
        directory: a directory with the checkpoint.
        repo_id: the checkpoint's name on the hub, by which Transformers picks the class of some tokenizers.

    Raises:
        TokenizerError: if there is no tokenizer, one of its files is damaged, or it needs code of its own.
    """
    with _errors(lambda error: _why_not_loaded(directory, error)):
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        if repo_id is not None:
            options["config"] = AutoConfig.from_pretrained(directory, **options)
            options["config"].name_or_path = repo_id
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    return tokenizer


def text_token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, text_name: str, model: PreTrainedModel | int | None
) -> list[int]:
    """
    Return the token ids of a text, without special tokens and never truncated.

    Args:
        tokenizer: the model's.
        text: the text.
        text_name: name of the text in errors.
        model: the model that is to take the ids, or its number of embeddings; None checks nothing.

    Raises:
        TokenizerError: if the tokenizer fails or gives no ids, or the model has no embedding for one of them.
    """
    with _errors(
        lambda error: f"{tokenizer_name(tokenizer)}: its tokenizer cannot tokenize {text_name}: {_reason(error)}"
    ):
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    if not ids and text.strip():
        raise TokenizerError(
            f"{tokenizer_name(tokenizer)}: its tokenizer must give tokens for {text_name}, got none; {_WHAT_TO_DO}"
        )
    check_token_ids(tokenizer, ids, text_name, model)
    return ids


def check_token_ids(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], source: str, model: PreTrainedModel | int | None
) -> None:
    """
    Check that a model has an embedding for every token id.

    Args:
        tokenizer: the model's.
        ids: token ids.
        source: name, in errors, of the text that the ids come from.
        model: the model, or its number of embeddings; None checks nothing.

    Raises:
        TokenizerError: if it has none for one of them.
    """
    rows = model if isinstance(model, int) else embedding_rows(model)
    highest = max(ids, default=0)
    if rows is not None and highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise TokenizerError(
            f"{tokenizer_name(tokenizer)}: token ids must be below {rows}, the number of the model's embeddings, "
            f"got {highest} ({token!r}) in {source}; use the tokenizer that the model was trained with"
        )


def embedding_rows(model: PreTrainedModel | None) -> int | None:
    """Return the number of token ids that a model has embeddings for; None if that is not known."""
    try:
        embeddings: Any = None if model is None else model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model whose embeddings Transformers does not find
        return None
    return getattr(embeddings, "num_embeddings", None)


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """
    Return a chat as text, written by the tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the chat.
        add_generation_prompt: whether the text ends where the assistant is to answer.

    Raises:
        TokenizerError: if the template fails, whatever it raises, or is one of several without a default.
    """
    roles = ", ".join(message["role"] for message in messages)
    with _errors(
        lambda error: (
            f"{tokenizer_name(tokenizer)}: its chat template cannot write a chat of {roles}: {_reason(error)}; correct "
            f"the template in {_TEMPLATE} or {_CONFIG}"
        )
    ):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return str(text)


@contextmanager
def _errors(message: Callable[[BaseException], str]) -> Iterator[None]:
    """Make every error a TokenizerError with the message that `message` returns for it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a template can raise anything; panics of tokenizers are not Exceptions
        raise TokenizerError(message(error)) from None


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the path that a tokenizer was loaded from, or a word for it if it was not loaded."""
    return str(tokenizer.name_or_path) or "tokenizer"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _why_not_loaded(directory: Path, error: BaseException) -> str:
    """Name the file and the field for which a tokenizer cannot be loaded, as Transformers' errors name neither."""
    contents = {}
    for name in _JSON_FILES:
        path = directory / name
        if not path.exists():
            continue
        try:
            contents[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as damage:
            return f"{path}: must be a JSON file, got {_reason(damage)}; {_WHAT_TO_DO}"
        if not isinstance(contents[name], dict):
            found = type(contents[name]).__name__
            return f"{path}: must hold a JSON object, got a {found}; {_WHAT_TO_DO}"
    try:
        (directory / _TEMPLATE).read_text(encoding="utf-8")
    except UnicodeDecodeError as damage:
        return f"{directory / _TEMPLATE}: must be UTF-8, got {damage.reason} at byte {damage.start}; {_WHAT_TO_DO}"
    except OSError:  # there is none
        pass
    config = contents.get(_CONFIG, {})
    if (field := _wrong_field(config)) is not None:
        return f"{directory / _CONFIG}: {field}; {_WHAT_TO_DO}"
    if config.get("auto_map"):
        return (
            f"{directory / _CONFIG}: auto_map={config['auto_map']!r} needs code of the checkpoint's, which is never "
            "run; save the tokenizer as a tokenizer.json without auto_map"
        )
    if "tokenizer.json" in contents:
        return f"{directory}: Transformers cannot load its tokenizer: {_reason(error)}; {_WHAT_TO_DO}"
    if any(directory.glob("*.model")) or any(directory.glob("vocab*")):
        return f"{directory}: has no tokenizer.json, and its tokenizer cannot be made one: {_reason(error)}"
    return f"{directory / 'tokenizer.json'}: no such file, so text cannot be tokenized; {_WHAT_TO_DO}"


def _wrong_field(config: dict[str, Any]) -> str | None:
    """Return how the first field of a tokenizer_config.json that has a wrong type is wrong."""
    name = config.get("tokenizer_class")
    if not isinstance(name, str | None):
        return f"tokenizer_class must be a name, got {name!r}"
    auto_map = config.get("auto_map")
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if not isinstance(entry, str | list | None) or (entry is auto_map and isinstance(entry, str)):
        return f"auto_map must give AutoTokenizer a class or a list of classes, got {auto_map!r}"
    template = config.get("chat_template")
    templates = template if isinstance(template, list) else []
    if any(not (isinstance(one, dict) and {"name", "template"} <= one.keys()) for one in templates):
        return f"chat_template must be a template, or a list of objects with name and template, got {template!r}"
    return None

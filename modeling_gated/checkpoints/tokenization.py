"""Tokenizers of checkpoints: loading one, checking its token ids against a model, writing its chats."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

import modeling_gated.registration  # noqa: F401 - makes AutoTokenizer know gated_llama
from modeling_gated.errors import ConversionError, TokenizerError

from .loading import read_model_config


_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"
_JSON_FILES = (_TOKENIZER, _CONFIG, "special_tokens_map.json", "added_tokens.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WHAT_TO_DO = "copy the tokenizer files again from the model that the checkpoint was made from"


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
        if not isinstance(tokenizer.model_max_length, int | float):  # loads, and fails for the first text
            raise TypeError("model_max_length is no number")
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, text_name: str, *, add_special_tokens: bool = False
) -> list[int]:
    """
    Return the token ids of a text, never truncated.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        text_name: name of the text in errors.
        add_special_tokens: whether the ids begin and end as the tokenizer begins and ends an input.

    Raises:
        TokenizerError: if the tokenizer fails.
    """
    with _errors(
        lambda error: f"{tokenizer_name(tokenizer)}: its tokenizer cannot tokenize {text_name}: {_reason(error)}"
    ):
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
    return encoded["input_ids"]


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
    ids = encode(tokenizer, text, text_name)
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
    """Return the number of token ids that a model has embeddings for; None without a model."""
    if model is None:
        return None
    embeddings: Any = model.get_input_embeddings()
    return embeddings.num_embeddings


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
            type_name = type(contents[name]).__name__
            return f"{path}: must hold a JSON object, got a {type_name}; {_WHAT_TO_DO}"
    for path in (directory / _TEMPLATE, *sorted(directory.glob(_MORE_TEMPLATES))):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as damage:
            return f"{path}: must be UTF-8, got {damage.reason} at byte {damage.start}; {_WHAT_TO_DO}"
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
    if (damage_elsewhere := _damaged_file(directory)) is not None:
        return damage_elsewhere
    if _TOKENIZER in contents:
        return f"{directory}: Transformers cannot load its tokenizer: {_reason(error)}; {_WHAT_TO_DO}"
    if any(directory.glob("*.model")) or any(directory.glob("vocab*")):
        return f"{directory}: has no tokenizer.json, and its tokenizer cannot be made one: {_reason(error)}"
    return f"{directory / _TOKENIZER}: no such file, so text cannot be tokenized; {_WHAT_TO_DO}"


def _damaged_file(directory: Path) -> str | None:
    """Return how config.json, which Transformers reads for a tokenizer too, or tokenizer.json is damaged."""
    if (directory / CONFIG_NAME).exists():
        try:
            read_model_config(directory)
        except ConversionError as error:
            return str(error)
    path = directory / _TOKENIZER
    if path.exists():
        try:
            with _errors(lambda error: f"{path}: must be a complete tokenizer, got {_reason(error)}; {_WHAT_TO_DO}"):
                Tokenizer.from_file(str(path))
        except TokenizerError as error:
            return str(error)
    return None


def _wrong_field(config: dict[str, Any]) -> str | None:
    """Return how the first field of a tokenizer_config.json that Transformers cannot take is wrong."""
    for names, is_right, requirement in _FIELD_RULES:
        for name in names:
            if (value := config.get(name)) is not None and not is_right(value):
                return f"{name} must {requirement}, got {value!r:.200}"
    return None


def _names_a_class(auto_map: Any) -> bool:
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    return isinstance(entry, str | list | None) and not isinstance(auto_map, str)


def _has_templates(template: Any) -> bool:
    templates = template if isinstance(template, list) else []
    return all(isinstance(item, dict) and {"name", "template"} <= item.keys() for item in templates)


def _has_added_tokens(tokens: Any) -> bool:
    return isinstance(tokens, dict) and all(
        number.isdecimal() and isinstance(token, dict) for number, token in tokens.items()
    )


# Names of fields, a test of their values, and the words for values that pass.
_FIELD_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("tokenizer_class",), lambda value: isinstance(value, str), "be a name"),
    (("auto_map",), _names_a_class, "give AutoTokenizer a class or a list of classes"),
    (("chat_template",), _has_templates, "be a template, or a list of objects with name and template"),
    (_SPECIAL_TOKENS, lambda value: isinstance(value, str | dict), "be a token"),
    (("padding_side", "truncation_side"), lambda value: value in ("left", "right"), "be 'left' or 'right'"),
    (("extra_special_tokens",), lambda value: isinstance(value, list | dict), "be a list or an object of tokens"),
    (("added_tokens_decoder",), _has_added_tokens, "be an object of token ids and their tokens"),
    (("model_max_length",), lambda value: isinstance(value, int | float), "be a number of tokens"),
)

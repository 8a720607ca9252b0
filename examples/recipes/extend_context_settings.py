"""Settings of examples/recipes/extend_context.py, read from a TOML file."""

import math
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from examples.shared.packed_text import files
from modeling_gated.configuration import GatedLlamaConfig, extend_context


Table = TypeVar("Table")
MAY_BE_ZERO = ("seed", "warmup_steps")


class SettingsError(ValueError):
    """A wrong setting. The message names the file and the setting in one line."""


@dataclass(frozen=True)
class FromScratch:
    """Settings of a model that is first trained at a short length, instead of a checkpoint."""

    length: int
    steps: int
    batch_size: int
    learning_rate: float
    vocabulary_size: int = 2048  # of the tokenizer that is trained without `tokenizer`
    config: dict[str, Any] = field(default_factory=dict)  # fields of GatedLlamaConfig


@dataclass(frozen=True)
class Settings:
    """Settings of the recipe. Lengths are in tokens. Batch sizes are sequences per process and forward pass."""

    rope_theta: float
    length: int
    steps: int
    batch_size: int
    learning_rate: float
    yarn_length: int
    model: str = ""  # folder of a checkpoint; required without from_scratch
    tokenizer: str = ""  # folder of a tokenizer; default: the model's
    text: list[str] = field(default_factory=list)  # globs of UTF-8 files; default: Python's language reference
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    evaluation_windows: int = 8
    save_every: int = 100
    seed: int = 0
    mixed_precision: str = "no"
    from_scratch: FromScratch | None = None


def read_settings(path: Path) -> Settings:
    """
    Read and check a TOML file of settings. Texts are not read yet.

    Raises:
        SettingsError: if a setting is missing, unknown or wrong.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    settings = _from_table(Settings, table, f"{path}: ")

    problem = None
    if bool(settings.model) == (settings.from_scratch is not None):
        problem = f"either model or a table [from_scratch] must be given, got model={settings.model!r}"
    elif settings.model and not (Path(settings.model) / "config.json").is_file():
        problem = f"model must be the folder of a checkpoint, got {settings.model!r} without config.json"
    elif settings.tokenizer and not Path(settings.tokenizer).is_dir():
        problem = f"tokenizer must be a folder, got {settings.tokenizer!r}"
    elif settings.text and not files(settings.text):
        problem = f"text must match a file, got {settings.text}"
    elif settings.mixed_precision not in ("no", "bf16"):
        problem = f"mixed_precision must be 'no' or 'bf16', got {settings.mixed_precision!r}"
    if problem is not None:
        raise SettingsError(f"{path}: {problem}")
    try:
        config = starting_config(settings)
        extend_context(config, settings.length, "rope_base", settings.rope_theta)
        extend_context(config, settings.yarn_length, "yarn")
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SettingsError(f"{path}: {error.__cause__ or error}") from error
    return settings


def starting_config(settings: Settings) -> PreTrainedConfig:
    """Return the config before the context is extended. A config from scratch has no token ids yet."""
    if settings.from_scratch is None:
        return AutoConfig.from_pretrained(settings.model)
    scratch = settings.from_scratch
    if unknown := scratch.config.keys() - {known.name for known in fields(GatedLlamaConfig)}:
        raise ValueError(f"from_scratch.config.{min(unknown)} must be a field of GatedLlamaConfig; remove it")
    return GatedLlamaConfig(**{"max_position_embeddings": scratch.length} | scratch.config)


def _from_table(kind: type[Table], table: dict[str, Any], where: str) -> Table:
    types = get_type_hints(kind)
    values = {}
    for name, value in table.items():
        if name not in types:
            raise SettingsError(f"{where}{name}={value!r} is unknown; the settings are {', '.join(types)}")
        values[name] = _checked(types[name], name, value, where)
    for known in fields(kind):  # type: ignore[arg-type]
        if known.name not in values and known.default is MISSING and known.default_factory is MISSING:
            raise SettingsError(f"{where}{known.name} must be given; add it")
    return kind(**values)


def _checked(kind: Any, name: str, value: Any, where: str) -> Any:
    """Return a value converted to the type of its field."""
    if isinstance(kind, UnionType) and isinstance(value, dict):
        return _from_table(get_args(kind)[0], value, f"{where}{name}.")
    plain = get_origin(kind) or kind
    if kind is float and type(value) is int:
        value = float(value)
    if isinstance(kind, UnionType) or type(value) is not plain:
        expected = "a table" if isinstance(kind, UnionType) else f"of type {plain.__name__}"
        raise SettingsError(f"{where}{name} must be {expected}, got {value!r}")
    if plain is list and not all(isinstance(element, str) for element in value):
        raise SettingsError(f"{where}{name} must be a list of str, got {value!r}")
    if plain in (int, float) and not (0 < value < math.inf or (value == 0 and name in MAY_BE_ZERO)):
        raise SettingsError(f"{where}{name} must be positive and finite, got {value!r}")
    return value

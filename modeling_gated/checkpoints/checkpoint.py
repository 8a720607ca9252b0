"""Reading a checkpoint: its config, the headers of its shards, and the files beside them."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_gated.errors import ConversionError

from .files import MAX_CONFIG_BYTES, read_json, resolve
from .safetensors_file import Shard, Tensor, read_shard
from .side_files import PICKLE_SUFFIXES, find_side_files


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint, known by its config.json and its headers alone.

    `raw_config` is what config.json says, `shards` are in the order of the file names. `index_metadata` is the metadata
    of the index and `weight_map` the index's name of each tensor's shard, if there is an index; without, there is one
    shard. The two may disagree about where a tensor is: the shards are right, and `check_index` compares them.
    """

    directory: Path
    raw_config: dict[str, Any]
    shards: tuple[Shard, ...]
    index_metadata: dict[str, Any]
    has_index: bool = False
    weight_map: dict[str, str] = field(default_factory=dict)

    @property
    def config_path(self) -> Path:
        """The file that the config comes from."""
        return self.directory / CONFIG_NAME if self.directory.is_dir() else self.directory

    @property
    def index_path(self) -> Path:
        """The file that names the shards, if there is one."""
        return self.directory / SAFE_WEIGHTS_INDEX_NAME

    def tensors(self) -> dict[str, tuple[Shard, Tensor]]:
        """Return every tensor with its shard: the last one that holds the tensor, which Transformers loads."""
        return {name: (shard, tensor) for shard in self.shards for name, tensor in shard.tensors.items()}

    def layers(self) -> int:
        """Return the number of decoder layers that the shards hold."""
        pattern = re.compile(r"model\.layers\.(\d{1,6})\.")
        matches = (pattern.match(name) for shard in self.shards for name in shard.tensors)
        return max((int(match[1]) + 1 for match in matches if match), default=0)

    def side_files(self) -> tuple[str, ...]:
        """
        Return the files to carry over, by their paths in `directory`, as `choose_side_files` chooses them.

        Raises:
            ConversionError: if one of them is not a regular file, or a link to a place outside of the checkpoint.
        """
        return find_side_files(self.directory, self._weights()).kept

    def left_out(self) -> dict[str, int]:
        """Return the sizes in bytes of the files that are not carried over, by their paths in `directory`."""
        return find_side_files(self.directory, self._weights()).left_out

    def _weights(self) -> dict[str, Path]:
        return {shard.name: shard.path for shard in self.shards}


def open_checkpoint(source: Path) -> Checkpoint:
    """
    Read the config and the headers of a checkpoint.

    Args:
        source: a directory with `model.safetensors` or `model.safetensors.index.json`, or one safetensors file with
            its `config.json` beside it.

    Raises:
        ConversionError: if the checkpoint is incomplete, damaged or in no format that is read here.
    """
    directory = source if source.is_dir() else source.parent
    if source.is_file() and source.suffix.lower() in PICKLE_SUFFIXES:
        raise ConversionError(_why_no_weights(directory))
    if source.is_file() and source.suffix.lower() != ".safetensors":
        raise ConversionError(f"{source}: neither a directory nor a safetensors or GGUF file")
    if not (directory / CONFIG_NAME).exists() and any(path.suffix.lower() == ".gguf" for path in directory.iterdir()):
        raise ConversionError(_why_no_weights(directory))
    raw_config = read_json(resolve(directory, CONFIG_NAME), MAX_CONFIG_BYTES)
    if (directory / "adapter_config.json").exists():
        raise ConversionError(f"{directory}: has an adapter (adapter_config.json); merge it into the model first")

    single = source.name if source.is_file() else SAFE_WEIGHTS_NAME
    if os.path.lexists(directory / single):  # as in Transformers, it goes before an index
        return Checkpoint(directory, raw_config, (read_shard(resolve(directory, single), single),), {})
    if os.path.lexists(directory / SAFE_WEIGHTS_INDEX_NAME):
        weight_map, metadata = read_weight_map(resolve(directory, SAFE_WEIGHTS_INDEX_NAME))
        names = sorted(set(weight_map.values()))
        shards = tuple(read_shard(_resolve_shard(directory, name), name) for name in names)
        return Checkpoint(directory, raw_config, shards, metadata, has_index=True, weight_map=weight_map)
    raise ConversionError(_why_no_weights(directory))


def _resolve_shard(directory: Path, name: str) -> Path:
    """Return the regular file of a shard that the index names."""
    try:
        os.lstat(directory / name)
    except FileNotFoundError:
        raise ConversionError(
            f"{directory / name}: no such file, but {SAFE_WEIGHTS_INDEX_NAME} names it; download the file, or the "
            "whole checkpoint, again"
        ) from None
    except (OSError, ValueError):  # a name that cannot be a file's, which the next line refuses
        pass
    return resolve(directory, name)


def shorter_tokenizer(directory: Path, length: int) -> int | None:
    """Return the `model_max_length` of a checkpoint's tokenizer if it is less than `length`, otherwise None."""
    path, max_length = directory / "tokenizer_config.json", None
    with suppress(ConversionError):  # nothing depends on it
        max_length = read_json(path).get("model_max_length") if path.is_file() else None
    return max_length if isinstance(max_length, int) and max_length < length else None


def rewriting_command(source: str, target: str) -> str:
    """Return the command that loads a model with Transformers and saves it as safetensors."""
    return (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"[c.from_pretrained('{source}').save_pretrained('{target}') for c in (M, T)]\""
    )


def _why_no_weights(directory: Path) -> str:
    files = sorted(directory.iterdir())
    if pickles := [path.name for path in files if path.suffix.lower() in PICKLE_SUFFIXES]:
        return (
            f"{directory}: has only pickled weights ({pickles[0]}), which are never loaded here; rewrite them with: "
            f"{rewriting_command(str(directory), f'{directory}-safetensors')}"
        )
    if gguf := [path for path in files if path.suffix.lower() == ".gguf"]:
        return f"{directory}: has no safetensors weights; to convert the GGUF file, give its path: {gguf[0]}"
    return f"{directory}: has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"


def read_weight_map(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """
    Read an index: the name of each tensor's shard, and the metadata.

    Raises:
        ConversionError: if the file is not an index of safetensors files in its own directory.
    """
    raw = read_json(path)
    weight_map, metadata = raw.get("weight_map"), raw.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path}: weight_map is missing or empty")
    for tensor, name in weight_map.items():
        pure = PurePosixPath(name) if isinstance(name, str) else None
        if pure is None or pure.is_absolute() or ".." in pure.parts or pure.suffix != ".safetensors":
            raise ConversionError(f"{path}: {tensor} is in {name!r}, not a safetensors file of the checkpoint")
    return weight_map, metadata if isinstance(metadata, dict) else {}

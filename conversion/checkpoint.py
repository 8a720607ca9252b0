"""Reading an ungated checkpoint: its config, the headers of its shards, and the files beside them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME

from modeling_gated.configuration import check_source_family

from .errors import ConversionError


PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth"}
WEIGHT_SUFFIXES = {*PICKLE_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".safetensors"}


@dataclass(frozen=True)
class Shard:
    """One safetensors file, its links resolved. `tensors` maps each name to its dtype's code and its shape."""

    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    header_bytes: int
    file_bytes: int

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return self.file_bytes - self.header_bytes


@dataclass(frozen=True)
class Checkpoint:
    """
    An ungated checkpoint, known by its headers alone.

    `shards` is in the order of the file names, `index_metadata` the metadata of the index, if there is one.
    """

    directory: Path
    config: PreTrainedConfig
    shards: tuple[Shard, ...]
    index_metadata: dict[str, Any]

    def side_files(self) -> Iterator[Path]:
        """
        Paths, relative to `directory`, of the files to carry over: all but weights, the config and the index, what
        hidden folders hold, and checkpoints in folders of their own.
        """
        for folder, subfolders, names in os.walk(self.directory):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            weights = {name for name in names if Path(name).suffix in WEIGHT_SUFFIXES}
            is_top = Path(folder) == self.directory
            if not is_top and weights and CONFIG_NAME in names:
                subfolders.clear()
                continue
            skipped = weights | ({CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME} if is_top else set())
            for name in sorted(set(names) - skipped):
                if (path := Path(folder, name)).is_file():
                    yield path.relative_to(self.directory)


def open_checkpoint(source: Path) -> Checkpoint:
    """
    Read the config and the headers of a checkpoint, and check that the index and the headers agree.

    Args:
        source: a directory with `model.safetensors` or `model.safetensors.index.json`, or one safetensors file with
            its `config.json` beside it.

    Raises:
        ConversionError: if the checkpoint is incomplete, damaged or of a kind that cannot be converted.
    """
    directory = source if source.is_dir() else source.parent
    if not (directory / CONFIG_NAME).exists() and any(path.suffix.lower() == ".gguf" for path in directory.iterdir()):
        raise ConversionError(_why_no_weights(directory))
    config = _read_config(directory)
    if (directory / "adapter_config.json").exists():
        raise ConversionError(f"{directory}: has an adapter (adapter_config.json); merge it into the model first")

    single = source if source.is_file() else directory / SAFE_WEIGHTS_NAME
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():  # as in Transformers, it goes before an index
        return Checkpoint(directory, config, (_read_shard(single),), {})
    if index.is_file():
        weight_map, metadata = _read_index(index)
        shards = tuple(_read_shard(directory / name) for name in sorted(set(weight_map.values())))
        _compare(index, weight_map, shards)
        return Checkpoint(directory, config, shards, metadata)
    raise ConversionError(_why_no_weights(directory))


def _why_no_weights(directory: Path) -> str:
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in WEIGHT_SUFFIXES)
    if pickles := [path.name for path in files if path.suffix in PICKLE_SUFFIXES]:
        return (
            f"{directory}: has only pickled weights ({pickles[0]}), which are never loaded here; rewrite them with: "
            f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"[c.from_pretrained('{directory}').save_pretrained('{directory}-safetensors') for c in (M, T)]\""
        )
    if gguf := [path for path in files if path.suffix.lower() == ".gguf"]:
        return f"{directory}: has no safetensors weights; to convert the GGUF file, give its path: {gguf[0]}"
    return f"{directory}: has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: not a JSON object")
    return value


def _read_config(directory: Path) -> PreTrainedConfig:
    path = directory / CONFIG_NAME
    raw = _read_json(path)
    try:
        check_source_family(raw.get("model_type"))
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from None
    if raw.get("quantization_config") is not None:
        raise ConversionError(f"{path}: quantization_config: quantized checkpoints are not supported yet")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except StrictDataclassError as error:
        raise ConversionError(f"{path}: {error.__cause__}") from None
    except Exception as error:  # whatever Transformers makes of a damaged config, it names the field
        raise ConversionError(f"{path}: {error}") from None


def _read_shard(path: Path) -> Shard:
    try:
        path = path.resolve(strict=True)
        with open(path, "rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
        with safe_open(path, framework="np") as header:
            slices = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118 - not a mapping
            tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: not a complete safetensors file: {error}") from None
    return Shard(path, tensors, header_bytes, path.stat().st_size)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    raw = _read_json(path)
    weight_map, metadata = raw.get("weight_map"), raw.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path}: weight_map is missing or empty")
    for tensor, name in weight_map.items():
        pure = PurePath(name) if isinstance(name, str) else None
        if pure is None or pure.is_absolute() or ".." in pure.parts or pure.suffix != ".safetensors":
            raise ConversionError(f"{path}: {tensor} is in {name!r}, not a safetensors file of the checkpoint")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _compare(index: Path, weight_map: dict[str, str], shards: tuple[Shard, ...]) -> None:
    """Raise unless each tensor lies in the one shard that the index names for it."""
    found: dict[str, Path] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor in found:
                raise ConversionError(f"{shard.path}: {tensor} is also in {found[tensor].name}")
            found[tensor] = shard.path
    for tensor, name in weight_map.items():
        if tensor not in found or found[tensor] != (index.parent / name).resolve():
            raise ConversionError(f"{index}: {tensor} is not in {name}")
    if extra := sorted(found.keys() - weight_map.keys()):
        raise ConversionError(f"{index}: {extra[0]} is in {found[extra[0]].name}, but not in the index")

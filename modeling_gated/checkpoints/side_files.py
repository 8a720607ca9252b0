"""The choice of the files that come along with a checkpoint's weights, on the hub and in a directory."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from modeling_gated.errors import ConversionError

from .files import read_json, resolve


# Larger files come along only if something names them. Tokenizers of large vocabularies take up to about 35 MB.
SMALL_FILE_BYTES = 50_000_000
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# Weights in other forms, which are left out at any size. The list need not be complete: unknown ones are large.
WEIGHT_SUFFIXES = {
    *PICKLE_SUFFIXES,
    *(".distcp", ".engine", ".gguf", ".h5", ".keras", ".litertlm", ".llamafile", ".mlmodel", ".mlmodelc"),
    *(".mlpackage", ".msgpack", ".nemo", ".onnx", ".ot", ".pb", ".plan", ".pte", ".safetensors", ".task", ".tflite"),
    *(".tar", ".tgz", ".zip"),  # archives, of which nobody knows what is in them
}
# Files that Transformers' tokenizers and processors read by name, which come along at any size.
TOKENIZER_FILES = {
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "preprocessor_config.json"),
    *("processor_config.json", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tekken.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json", "vocab.json", "vocab.txt"),
}
# The configs that may name further files.
_NAMING_CONFIGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_WRITTEN_ANEW = {CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME}


@dataclass(frozen=True)
class SideFiles:
    """
    Files next to a checkpoint's weights, by their paths in the checkpoint: those that come along, and the sizes of
    those that are left out.
    """

    kept: tuple[str, ...]
    left_out: dict[str, int]


def choose_side_files(sizes: Mapping[str, int], weights: Collection[str], named: Collection[str] = ()) -> SideFiles:
    """
    Choose the files that come along with a checkpoint's weights.

    Kept are small files, tokenizer files and files that are `named`. Left out are weights in other forms, folders with
    a checkpoint of their own, and all other large files. Hidden files and folders, except .gitattributes, are in
    neither group, nor are the config and the index.

    Args:
        sizes: the sizes in bytes of all files, by their paths in the checkpoint.
        weights: the files among them that hold the checkpoint's weights.
        named: files that the checkpoint's configs name.
    """
    paths = {name: PurePosixPath(name) for name in sizes}
    folders_with_weights = {path.parent for path in paths.values() if _is_weights(path)}
    checkpoints = {path.parent for path in paths.values() if path.name == CONFIG_NAME} & folders_with_weights
    checkpoints.discard(PurePosixPath("."))
    kept, left_out = [], {}
    for name, path in sorted(paths.items()):
        if name in weights or name in _WRITTEN_ANEW or _is_hidden(path):
            continue
        is_named = name in named or name in TOKENIZER_FILES
        is_small = sizes[name] <= SMALL_FILE_BYTES and not _is_weights(path)
        is_safe = path.suffix.lower() not in PICKLE_SUFFIXES
        if (is_small or (is_named and is_safe)) and checkpoints.isdisjoint(path.parents):
            kept.append(name)
        else:
            left_out[name] = sizes[name]
    return SideFiles(tuple(kept), left_out)


def find_side_files(directory: Path, weights: Mapping[str, Path]) -> SideFiles:
    """
    Choose the files that come along with the weights in a directory. Folders that are links are left out.

    Args:
        directory: the checkpoint's directory; if it is no directory, there are no files.
        weights: the files that hold the checkpoint's weights, with the regular files that they lead to.

    Raises:
        ConversionError: if a file to keep is not a regular file, or a link to a place outside of the checkpoint.
    """
    sizes, linked_folders = {}, {}
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            if (path := Path(folder, name)).is_symlink():
                linked_folders[f"{path.relative_to(directory).as_posix()}/"] = path.lstat().st_size
        for name in names:
            path = Path(folder, name)
            sizes[path.relative_to(directory).as_posix()] = _size(path)
    content = set(weights.values())  # also under another name, where the weights' names are links
    same = {name for name in sizes if _is_weights(PurePosixPath(name)) and _target(directory / name) in content}
    chosen = choose_side_files(sizes, same | weights.keys())
    if chosen.left_out:
        chosen = choose_side_files(sizes, same | weights.keys(), named_files(directory))
    for name in chosen.kept:
        resolve(directory, name)
    return SideFiles(chosen.kept, dict(sorted((chosen.left_out | linked_folders).items())))


def named_files(directory: Path) -> set[str]:
    """Return all words in the configs of a checkpoint's tokenizer and processors, which may be names of files."""
    words: set[str] = set()
    for config in _NAMING_CONFIGS:
        with suppress(ConversionError):  # no such config, or a damaged one, which names nothing
            words.update(_words(read_json(resolve(directory, config))))
    return words


def _words(value: object) -> Iterator[str]:
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, str):
            yield value.removeprefix("./")


def _is_weights(path: PurePosixPath) -> bool:
    """Return whether a name is one of weights, in whatever form, of a part of them, or of an index of them."""
    if any(
        PurePosixPath(name_part).suffix.lower() in WEIGHT_SUFFIXES for name_part in path.parts
    ):  # folders too: .mlpackage
        return True
    name = path.name.lower()
    if any(suffix.startswith(".onnx") for suffix in path.with_name(name).suffixes):  # .onnx_data, .onnx_data_1
        return True
    return name.endswith(".index.json") and _is_weights(PurePosixPath(name.removesuffix(".index.json")))


def _is_hidden(path: PurePosixPath) -> bool:
    shown = path.parts[:-1] if path.name == ".gitattributes" else path.parts
    return any(name_part.startswith(".") for name_part in shown)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # a link to nowhere, which is refused if the file is to be kept
        return 0


def _target(path: Path) -> Path | None:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):
        return None

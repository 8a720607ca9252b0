"""Repair of a gated checkpoint's tokenizer, which earlier versions of conversion copied as it was."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import CONFIG_NAME

from modeling_gated.checkpoints.checkpoint import Checkpoint, open_checkpoint
from modeling_gated.checkpoints.file_names import MANIFEST_NAME, OWN_FILES
from modeling_gated.checkpoints.files import MAX_CONFIG_BYTES, errors_naming, parse_json, read_bytes, resolve
from modeling_gated.checkpoints.replacement import replace_files
from modeling_gated.checkpoints.sources import find_source
from modeling_gated.configuration import GatedLlamaConfig
from modeling_gated.errors import ConversionError

from .manifest import Manifest, as_bytes, read_manifest
from .refresh import directory_to_change, file_content, file_to_replace, with_new_files
from .tokenizers import link_files, load_tokenizer, tokenizer_changes


@dataclass(frozen=True)
class RepairedTokenizer:
    """
    Result of `repair_tokenizer`: the checkpoint's directory and the names of the files that were replaced, none if the
    tokenizer was the source's.
    """

    directory: Path
    files: tuple[str, ...]


def repair_tokenizer(checkpoint: str | os.PathLike, source: str | os.PathLike | None = None) -> RepairedTokenizer:
    """
    Give a converted checkpoint the tokenizer of its source: the class and the ids that `AutoTokenizer` finds there.

    Each file is replaced in one step; if one cannot be replaced, all get their old content back. The manifest, if there
    is one, keeps the old content for `ungate`, and no verification any more. No weights are written to.

    Args:
        checkpoint: the directory of a gated checkpoint.
        source: the checkpoint that it was converted from, a path or a hub id; if not given, the source's config.json
            in the manifest says which tokenizer it had.

    Raises:
        ConversionError: if there is no such checkpoint, it lies in the hub's cache, nothing says what the source's
            tokenizer is, or the checkpoint's has other settings, which would be lost.
    """
    with errors_naming(checkpoint):
        directory = directory_to_change(checkpoint)
        gated = open_checkpoint(directory)
        if (model_type := gated.raw_config.get("model_type")) != GatedLlamaConfig.model_type:
            raise ConversionError(f"{gated.config_path}: model_type must be gated_llama, got {model_type!r}")
        manifest = read_manifest(directory)
        files = [name for name in gated.side_files() if name not in OWN_FILES]
        with tempfile.TemporaryDirectory() as folder:
            view = Path(folder)
            repo_id = _view_source(view, gated, files, manifest, source)
            try:
                original = load_tokenizer(view, repo_id)
            except ConversionError as error:  # nothing can be found out
                raise ConversionError(str(error).replace(folder, str(source or directory))) from None
            config = read_bytes(resolve(directory, CONFIG_NAME), MAX_CONFIG_BYTES).decode()
            changes, differences = tokenizer_changes(original, directory, files, config)
        if changes is None:
            raise ConversionError(
                f"{directory}: the tokenizer would still differ from the source's: {'; '.join(differences[:3])}; copy "
                "the source's tokenizer files into the directory, then repair it again"
            )
        new = {name: content for name, content in changes.items() if file_content(directory, name) != content}
        contents = {file_to_replace(directory, name): content for name, content in new.items()}
        if new and manifest is not None:
            contents[file_to_replace(directory, MANIFEST_NAME)] = with_new_files(manifest, directory, new).content()
        replace_files(contents)
        return RepairedTokenizer(directory, tuple(new))


def _view_source(
    view: Path, gated: Checkpoint, files: list[str], manifest: Manifest | None, source: str | os.PathLike | None
) -> str | None:
    """Make a directory of what `AutoTokenizer` reads of the source; return the source's name on the hub."""
    if source is not None:
        location = find_source(os.fspath(source))
        if not location.path.is_dir():
            raise ConversionError(f"{source}: must be the directory of the source, or its name on the hub")
        link_files(location.path, view, [CONFIG_NAME, *open_checkpoint(location.path).side_files()])
        return location.repo_id
    if manifest is None or CONFIG_NAME not in manifest.replaced:
        raise ConversionError(
            f"{gated.directory}: has no {MANIFEST_NAME} that tells of its source; name the source as well: "
            "gated-llama repair-tokenizer CHECKPOINT --source SOURCE"
        )
    link_files(gated.directory, view, [name for name in files if name not in manifest.replaced])
    for name, text in manifest.replaced.items():
        if name in (CONFIG_NAME, *files):
            (view / name).write_bytes(as_bytes(text))
    parse_json(view / CONFIG_NAME, as_bytes(manifest.replaced[CONFIG_NAME]))
    repo_id = manifest.source.get("repo_id")
    return repo_id if isinstance(repo_id, str) else None

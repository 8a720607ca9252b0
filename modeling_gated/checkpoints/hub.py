"""Downloads from the Hugging Face hub: the weights that Transformers loads and the files that come along with them."""

from collections.abc import Collection
from glob import escape
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_gated.errors import ConversionError

from .checkpoint import read_weight_map, rewriting_command
from .files import resolve
from .side_files import TOKENIZER_FILES, SideFiles, choose_side_files, named_files


_ADAPTER_CONFIG_NAME, _ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def download(repo_id: str, revision: str | None) -> tuple[Path, dict[str, int]]:
    """
    Download a model's config, the weights that Transformers loads, and the files that come along with them.

    All files are of one commit. Without a network, a snapshot in the hub's cache is taken if it has the config, the
    weights and, as far as the cache knows of the repository, the tokenizer.

    Args:
        repo_id: the model's id.
        revision: a branch, tag or commit; `main` if not given.

    Returns:
        The snapshot's directory in the hub's cache, and the sizes in bytes of the repository's files that are not in
        there or are not to be carried over, by their paths in the repository.

    Raises:
        ConversionError: if the repository has no safetensors weights, or the cache lacks a file and there is no
            network.
        OSError: if the hub refuses, or cannot be reached and the cache has no such snapshot.
    """
    # By the user's revision, so that the cache has its commit; the rest by the commit, which does not move meanwhile.
    first = [CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, _ADAPTER_CONFIG_NAME]
    try:
        snapshot = Path(snapshot_download(repo_id, revision=revision, allow_patterns=first))
    except OfflineModeIsEnabled:  # huggingface_hub 1 asks the hub about a commit even if the cache has it
        snapshot = Path(snapshot_download(repo_id, revision=revision, allow_patterns=first, local_files_only=True))
    sizes, why_not = _repository_files(repo_id, snapshot.name)
    known = sizes or dict.fromkeys(_local_files(snapshot), 0)
    weights = _weights(repo_id, snapshot, known)
    if sizes and (absent := [name for name in weights if name not in sizes]):
        raise ConversionError(
            f"{repo_id}: {SAFE_WEIGHTS_INDEX_NAME} names {absent[0]}, which is not on the hub; name another commit "
            "with revision, or save the whole model again"
        )
    if why_not is None:
        side_files = choose_side_files(known, weights)
        _fetch(repo_id, snapshot.name, [*first, *weights, *side_files.kept])
        if (named := choose_side_files(known, weights, named_files(snapshot))) != side_files:
            _fetch(repo_id, snapshot.name, named.kept)
            side_files = named
    else:
        side_files = choose_side_files(known, weights, named_files(snapshot))
    needed = [*weights, *(name for name in side_files.kept if name in TOKENIZER_FILES)]
    if missing := [name for name in needed if not (snapshot / name).exists()]:
        raise ConversionError(
            f"{repo_id}: {missing[0]} is not in the hub's cache: {why_not or 'it was not downloaded'}; run the command "
            "again with access to the hub"
        )
    return snapshot, _left_out(side_files, sizes, snapshot)


def _fetch(repo_id: str, commit: str, names: Collection[str]) -> None:
    snapshot_download(repo_id, revision=commit, allow_patterns=[escape(name) for name in names])


def _repository_files(repo_id: str, commit: str) -> tuple[dict[str, int], str | None]:
    """
    Return the sizes of all files of a commit, empty if not known, and the reason if the hub cannot be asked for them.
    """
    try:
        entries = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
        return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}, None
    except Exception as error:  # errors of the network have classes that differ between versions of huggingface_hub
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    try:  # since huggingface_hub 2, the cache may know them
        cached = huggingface_hub.get_cached_repo_tree(repo_id, revision=commit)
        return {entry.path: entry.size for entry in cached}, reason
    except Exception:  # the cache does not know them, or huggingface_hub has no such function
        return {}, reason


def _local_files(snapshot: Path) -> list[str]:
    return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if not path.is_dir()]


def _weights(repo_id: str, snapshot: Path, files: Collection[str]) -> list[str]:
    """Return the files with the weights that Transformers loads; those of an adapter if there are no others."""
    if SAFE_WEIGHTS_NAME in files:  # as in Transformers, it goes before an index
        return [SAFE_WEIGHTS_NAME]
    if SAFE_WEIGHTS_INDEX_NAME in files:
        names = sorted(set(read_weight_map(resolve(snapshot, SAFE_WEIGHTS_INDEX_NAME))[0].values()))
        return names
    if _ADAPTER_CONFIG_NAME in files:
        return [name for name in [_ADAPTER_WEIGHTS_NAME] if name in files]
    if CONFIG_NAME not in files and (gguf := [name for name in files if name.lower().endswith(".gguf")]):
        raise ConversionError(
            f"{repo_id}: has no safetensors weights on the hub; download the GGUF file, and give its path: "
            f"hf download {repo_id} {gguf[0]} --local-dir ."
        )
    raise ConversionError(
        f"{repo_id}: has no safetensors weights on the hub, and others are never loaded here; rewrite them with: "
        f"{rewriting_command(repo_id, repo_id.rpartition('/')[2])}"
    )


def _left_out(side_files: SideFiles, sizes: dict[str, int], snapshot: Path) -> dict[str, int]:
    absent = {name: sizes[name] for name in side_files.kept if name in sizes and not (snapshot / name).exists()}
    known = {name: sizes[name] for name in side_files.left_out if name in sizes}
    return dict(sorted((known | absent).items()))

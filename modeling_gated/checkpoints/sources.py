"""Finding the checkpoint that a user names: a path, or a model on the Hugging Face hub."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from modeling_gated.errors import ConversionError

from .hub import download


@dataclass(frozen=True)
class Source:
    """
    A checkpoint: its name as the user gave it, `requested`, and its `path`, a directory or a safetensors or GGUF file.

    `repo_id` and `revision`, a commit, are known if it comes from the hub, or lies in the hub's cache. `left_out` holds
    the sizes in bytes of files on the hub that were not downloaded, by their paths in the repository.
    """

    requested: str
    path: Path
    repo_id: str | None = None
    revision: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix.lower() == ".gguf"

    @property
    def name(self) -> str:
        """Return the name for a model card: the id on the hub, or the last part of the path."""
        return self.repo_id or self.path.name


def find_source(requested: str, revision: str | None = None) -> Source:
    """
    Find a checkpoint. What is not a path is taken for a model on the hub and downloaded into the hub's cache, unless
    it is there; with `HF_HUB_OFFLINE=1` it has to be.

    Args:
        requested: a path, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.
        revision: the hub's branch, tag or commit; `main` if not given.

    Raises:
        ConversionError: if there is no such path and no such model.
    """
    # The path keeps its name: in the hub's cache, files are links to blobs whose names say nothing.
    path = Path(requested).absolute()
    if path.exists():
        if revision is not None:
            raise ConversionError(f"revision={revision!r}: {path} is a path, not a model on the hub")
        return Source(requested, path, *_cached(path.resolve() if path.is_dir() else path))
    try:
        validate_repo_id(requested)
    except HFValidationError:
        raise ConversionError(f"{path}: no such file or directory, and {requested!r} is no hub id") from None
    try:
        snapshot, left_out = download(requested, revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        where = "the hub's cache (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "the hub"
        at = f" at revision {revision}" if revision else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConversionError(
            f"{requested}: no such file or directory, and not to be had from {where}{at}: {reason}"
        ) from None
    return Source(requested, snapshot, *_cached(snapshot), left_out)


def _cached(path: Path) -> tuple[str | None, str | None]:
    """Return hub id and commit of a snapshot in the hub's cache, models--owner--name/snapshots/commit."""
    for folder in (path, *path.parents[:1]):
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/"), folder.name
    return None, None

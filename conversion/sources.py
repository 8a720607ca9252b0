"""Finding the checkpoint that a user names: a path, or a model on the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME

from .checkpoint import rewriting_command
from .errors import ConversionError


# Weights in other forms are not read, so they are not downloaded.
_NOT_READ = ["*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.pt", "*.pth"]


@dataclass(frozen=True)
class Source:
    """
    A checkpoint as the user named it, `given`, and where it lies: `path`, a directory or a safetensors or GGUF file.

    `repo_id` and `revision`, a commit, are known if it comes from the hub, or lies in the hub's cache.
    """

    given: str
    path: Path
    repo_id: str | None = None
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix.lower() == ".gguf"

    @property
    def name(self) -> str:
        """What a model card calls it: the hub's name, or the last part of the path."""
        return self.repo_id or self.path.name


def find_source(given: str, revision: str | None = None) -> Source:
    """
    Find a checkpoint. What is not a path is taken for a model on the hub and downloaded into the hub's cache, unless
    it is there; with `HF_HUB_OFFLINE=1` it has to be.

    Args:
        given: a path, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.
        revision: the hub's branch, tag or commit; `main` if not given.

    Raises:
        ConversionError: if there is no such path and no such model.
    """
    # The path keeps its name: in the hub's cache, files are links to blobs whose names say nothing.
    path = Path(given).absolute()
    if path.exists():
        if revision is not None:
            raise ConversionError(f"--revision {revision}: {path} is a path, not a model on the hub")
        return Source(given, path, *_cached(path.resolve() if path.is_dir() else path))
    try:
        validate_repo_id(given)
    except HFValidationError:
        raise ConversionError(f"{path}: no such file or directory, and {given!r} is no hub id") from None
    try:
        snapshot = Path(snapshot_download(given, revision=revision, ignore_patterns=_NOT_READ))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        where = "the hub's cache (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "the hub"
        at = f" at revision {revision}" if revision else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConversionError(
            f"{given}: no such file or directory, and not to be had from {where}{at}: {reason}"
        ) from None
    if (snapshot / CONFIG_NAME).exists() and not any(snapshot.glob("*.safetensors")):
        raise ConversionError(
            f"{given}: has no safetensors weights on the hub, and others are never loaded here; rewrite them with: "
            f"{rewriting_command(given, given.rpartition('/')[2])}"
        )
    return Source(given, snapshot, *_cached(snapshot))


def _cached(path: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of a snapshot in the hub's cache, models--owner--name/snapshots/commit."""
    for folder in (path, *path.parents[:1]):
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/"), folder.name
    return None, None

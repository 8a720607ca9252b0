"""The steps of `absorb_checkpoint`. Results of all steps but the comparison are kept in a folder for resuming."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from modeling_gated.checkpoints.checkpoint import open_checkpoint
from modeling_gated.checkpoints.config import stored_dtype
from modeling_gated.checkpoints.files import sync
from modeling_gated.checkpoints.replacement import replace_file
from modeling_gated.checkpoints.tokenization import check_token_ids
from modeling_gated.conversion.architecture import read_gated_config
from modeling_gated.errors import AbsorptionError
from modeling_gated.gate_names import is_gate
from modeling_gated.training.loop import check_run_settings

from .comparison import Comparison, prove
from .distillation.training import distil
from .edit.closed_form import AbsorbedLayer
from .edit.model import Edit, absorb_sinks
from .edit.sinks import SinkDirection
from .edit.writers import Writer
from .models import load_editable, load_original
from .sampling import sample_chats, sample_text, why_no_chats
from .settings import AbsorptionSettings
from .texts import Text, TrainingWindows, default_texts, given_texts, sampled_text, special_start


_EDIT, _DIRECTIONS = "edit.json", "directions.safetensors"


@dataclass(frozen=True)
class Work:
    """
    Inputs of the steps, and the steps as methods.

    Attributes:
        folder: folder for results of the steps.
        original: directory of the source checkpoint, with gates that are 1.
        tokenizer: tokenizer of the model.
        settings: settings of the run.
        dtype: dtype to compute in.
        device: device to compute on.
        progress: show progress bars, on a terminal.
        bfloat16_matmuls: sample from a bfloat16 model, and use bfloat16 matmuls in edit and distillation although
            models are float32. The search for massive activations and the comparison stay in float32.
        source: path of the checkpoint in errors, as the user gave it.
    """

    folder: Path
    original: Path
    tokenizer: PreTrainedTokenizerBase
    settings: AbsorptionSettings
    dtype: torch.dtype
    device: torch.device
    progress: bool
    bfloat16_matmuls: bool = False
    source: Path | None = None

    def texts(self, paths: Sequence[Path]) -> list[Text]:
        """
        Return the texts: the built-in texts, the given files, and text sampled from the source model.

        Args:
            paths: UTF-8 files. With files, built-in texts are used for the comparison only.

        Raises:
            AbsorptionError: if a file is too short, or kept samples are damaged.
            TokenizerError: if the tokenizer fails, or gives an id without an embedding.
        """
        embeddings = read_gated_config(open_checkpoint(self.original)).vocab_size
        check_token_ids(self.tokenizer, special_start(self.tokenizer), "the beginning of an input", embeddings)
        package_texts = default_texts(self.tokenizer, embeddings)
        if paths:  # built-in texts are then held out entirely
            package_texts = [Text(text.kind, [], text.held_out) for text in package_texts]
        texts = given_texts(paths, self.tokenizer, embeddings)
        for path, text in zip(paths, texts, strict=True):
            if len(text.held_out) < self.settings.window_tokens:
                tokens = len(text.training + text.validation + text.held_out)
                raise AbsorptionError(
                    f"{path}: a quarter of the text must be at least a window of {self.settings.window_tokens} tokens, "
                    f"got {tokens} tokens in all; use a longer text"
                )
        kept = self.folder / "sampled.json"
        if not kept.is_file():
            with self._timed("sampling"):
                replace_file(kept, json.dumps(self._sampled()).encode())
        sampled = _read_json(kept)
        return package_texts + texts + [sampled_text(*item) for item in sampled.items() if item[1]]

    def edit(self, texts: Sequence[Text]) -> Edit:
        """Edit the model without training on predictions, and save it as `edited`; return the edits."""
        path = self.folder / "edited"
        if not path.is_dir():
            with self._timed("edit"), self._making(path) as staging:
                edited = load_editable(self.original, self.dtype, self.device)
                windows = self._calibration_windows(texts)
                options = {"bfloat16_matmuls": self.bfloat16_matmuls, "progress": self.progress}
                edit = absorb_sinks(self._load_original(), edited, windows, self.settings, **options)
                edited.save_pretrained(staging)
                _write_edit(edit, staging)
        return _read_edit(path)

    def distil(self, texts: Sequence[Text], edit: Edit) -> Path:
        """Distil the edited model from the source model; return its folder. Weights have the checkpoint's dtype."""
        path = self.folder / "distilled"
        if not path.is_dir():
            with self._timed("distillation"), self._making(path) as staging:
                edited = load_editable(self.folder / "edited", self.dtype, self.device)
                if self.settings.steps > 0:
                    distil(
                        self._load_original(),
                        edited,
                        edit.directions,
                        texts,
                        self.tokenizer,
                        self.folder,
                        self.settings,
                        bfloat16_matmuls=self.bfloat16_matmuls,
                        progress=self.progress,
                    )
                _round(edited, self.stored_dtype)
                edited.save_pretrained(staging)
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        return path

    def tokens(self, texts: Sequence[Text], steps: int) -> int:
        """Return the number of tokens in the first steps of the distillation."""
        return self._windows(texts).tokens(steps, self.settings.window_tokens, self.settings.batch_size)

    def prove(self, path: Path, texts: Sequence[Text]) -> list[Comparison]:
        """Compare the distilled model, as saved, with the source model. Both compute in the same dtype."""
        with self._timed("proof"):
            edited = load_editable(path, self.dtype, self.device)
            original, windows = self._load_original(), self.settings.measured_windows
            return prove(original, edited, texts, self.tokenizer, windows=windows, progress=self.progress)

    def notes(self) -> list[str]:
        """Return notes on the texts for the user."""
        reason = why_no_chats(self.tokenizer) if self.settings.sample_tokens >= 2 else None
        return [] if reason is None else [f"no chats were sampled: {reason}"]

    @property
    def stored_dtype(self) -> torch.dtype:
        """Return the dtype of the checkpoint's weights."""
        return stored_dtype(open_checkpoint(self.original))

    @property
    def seconds(self) -> dict[str, float]:
        """Return the duration of each step in seconds, summed over interrupted runs."""
        path = self.folder / "seconds.json"
        return _read_json(path) if path.is_file() else {}

    def _load_original(self) -> Any:
        return load_original(self.original, self.dtype, self.device, self.source)

    def _sampled(self) -> dict[str, list[list[int]]]:
        """Sample text from the source model; return token ids by kind."""
        tokens = self.settings.sample_tokens
        dtype = torch.bfloat16 if self.bfloat16_matmuls else self.dtype
        # Load the model even without sampling, so that damaged weights are found before results are kept.
        model, seed = load_original(self.original, dtype, self.device, self.source), self.settings.seed
        if tokens < 2:
            return {}
        chats = sample_chats(model, self.tokenizer, tokens // 2, seed=seed, progress=self.progress)
        tokens -= tokens // 2 if chats else 0  # no chats without a chat template
        return {
            "chat": chats,
            "sampled": sample_text(model, self.tokenizer, tokens, seed=seed, progress=self.progress),
        }

    def _calibration_windows(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        """Return windows of calibration data, token ids [1, tokens] each: small batches give more steps."""
        settings = self.settings
        text = self._windows(texts)
        # The inverted seed draws other windows than distillation.
        numbers = range(max(1, settings.batches(settings.calibration_tokens)))
        length, count = settings.window_tokens, settings.batch_size
        batches = [text.training_batch(length, number * count, count, ~settings.seed) for number in numbers]
        return [window for batch in batches for window in batch.split(1)]

    def _windows(self, texts: Sequence[Text]) -> TrainingWindows:
        settings = self.settings
        return TrainingWindows(texts, self.tokenizer, settings.long_window_tokens, settings.batches_per_long)

    @contextmanager
    def _making(self, path: Path) -> Iterator[Path]:
        """Yield a staging folder, and rename it to `path` when it is complete."""
        staging = path.with_name(f"{path.name}.new")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        for path_in_staging in staging.rglob("*"):
            sync(path_in_staging)
        staging.rename(path)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            taken = self.seconds
            taken[step] = taken.get(step, 0.0) + time.perf_counter() - began
            replace_file(self.folder / "seconds.json", json.dumps(taken).encode())


def _round(model: Any, dtype: torch.dtype) -> None:
    """Convert a model to a checkpoint's dtype, except gates if `gate_dtype` is float32."""
    for name, parameter in model.named_parameters():
        if not (is_gate(name) and model.config.gate_dtype == "float32"):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """
    Create the folder for results of the steps, or check that it belongs to a run with the same inputs.

    Args:
        folder: folder, which may exist.
        settings: inputs of the run as JSON values.

    Raises:
        AbsorptionError: if the folder belongs to another run.
    """
    try:
        check_run_settings(settings, folder)
    except ValueError as error:
        raise AbsorptionError(f"{error}; remove the folder to start a new run") from None


def _write_edit(edit: Edit, folder: Path) -> None:
    content = {
        "writers": [asdict(writer) for writer in edit.writers],
        "layers": [asdict(layer) for layer in edit.layers],
    }
    (folder / _EDIT).write_text(json.dumps(content), encoding="utf-8")
    directions = {number: direction for number, direction in enumerate(edit.directions) if direction is not None}
    tensors = {
        f"{number}.{name}": tensor
        for number, direction in directions.items()
        for name, tensor in vars(direction).items()
    }
    save_file(tensors, folder / _DIRECTIONS)


def _read_edit(folder: Path) -> Edit:
    try:
        content = json.loads((folder / _EDIT).read_text(encoding="utf-8"))
        tensors = load_file(folder / _DIRECTIONS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damage(folder, error) from None
    return Edit(
        writers=[Writer(**writer) for writer in content["writers"]],
        layers=[AbsorbedLayer(**layer) for layer in content["layers"]],
        directions=[
            SinkDirection(tensors[f"{number}.direction"], tensors[f"{number}.projector"])
            if f"{number}.direction" in tensors
            else None
            for number in range(len(content["layers"]))
        ],
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damage(path, error) from None
    return content


def _damage(path: Path, error: Exception) -> AbsorptionError:
    return AbsorptionError(f"{path}: must be a complete result of an earlier run, got {error}; remove it and run again")

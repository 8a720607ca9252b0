"""The inputs of a run, which tell whether a later call may resume the run."""

import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from modeling_gated.checkpoints.sources import Source

from .settings import AbsorptionSettings


@dataclass(frozen=True)
class RunIdentity:
    """
    Inputs that determine the result of a run.

    Attributes:
        source: source checkpoint.
        texts: SHA-256 of each text file.
        settings: settings of the run.
        dtype: dtype to compute in; None if the checkpoint's dtype decides.
        bfloat16_matmuls: use of bfloat16 matmuls in sampling, fitting and training, although models are float32.
    """

    source: Source
    texts: dict[Path, str]
    settings: AbsorptionSettings
    dtype: torch.dtype | None
    bfloat16_matmuls: bool

    @property
    def matmul_dtype(self) -> str:
        """Return the name of the dtype of matmuls in sampling, fitting and training."""
        return "bfloat16" if self.bfloat16_matmuls else str(self.dtype).removeprefix("torch.")

    def as_settings(self) -> dict[str, Any]:
        """Return the inputs as JSON values: texts by their SHA-256, checkpoint files by size and modification time."""
        path = self.source.path
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        states = {file.name: file.stat() for file in files}
        texts = {os.fspath(text): digest for text, digest in self.texts.items()}
        return (
            {"checkpoint": os.fspath(path), "text": texts, "dtype": str(self.dtype), "products": self.matmul_dtype}
            | {"modeling-gated": version("modeling-gated")}
            | {f"{name} (size, mtime_ns)": [state.st_size, state.st_mtime_ns] for name, state in states.items()}
            | asdict(self.settings)
        )

    def record(self) -> dict[str, Any]:
        """Return the entries of `absorption.json` for the inputs, except the settings."""
        source = {"name": self.source.name, "repo_id": self.source.repo_id, "revision": self.source.revision}
        texts = {path.name: digest for path, digest in self.texts.items()}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"source": source, "texts": texts, "dtype": dtype, "products": self.matmul_dtype} | {
            "versions": {name: version(name) for name in ("modeling-gated", "torch", "transformers")}
        }

"""What the result of absorbing sinks depends on, to be told from what another call was given."""

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
    The checkpoint, text files with their SHA-256, settings, and what to compute in, None if the checkpoint says; and
    whether sampling, fitting and training multiply in bfloat16.
    """

    source: Source
    texts: dict[Path, str]
    settings: AbsorptionSettings
    dtype: torch.dtype | None
    bfloat16_matmuls: bool

    @property
    def matmul_dtype(self) -> str:
        """The dtype of matmuls in sampling, fitting and training."""
        return "bfloat16" if self.bfloat16_matmuls else str(self.dtype).removeprefix("torch.")

    def as_settings(self) -> dict[str, Any]:
        """What is the same as long as the inputs are: texts by their content, checkpoints by files' sizes and times."""
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
        """What the report says of them, beside the settings."""
        source = {"name": self.source.name, "repo_id": self.source.repo_id, "revision": self.source.revision}
        texts = {path.name: digest for path, digest in self.texts.items()}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"source": source, "texts": texts, "dtype": dtype, "products": self.matmul_dtype} | {
            "versions": {name: version(name) for name in ("modeling-gated", "torch", "transformers")}
        }

"""Extending checkpoints in tests: arguments, the fields and logits that are expected, config.json as it is."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


LONGER = {"length": 512}
YARN = {"length": 1024, "method": "yarn"}
MANIFEST = "gated_llama_manifest.json"


def yarn(length: int, original: int, theta: float = 10_000.0) -> dict[str, Any]:
    """YaRN's rope_parameters from its formulas."""
    factor = length / original
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": pytest.approx(0.1 * math.log(factor) + 1, rel=1e-15),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }


def in_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = in_json(path)
    change(content)
    path.write_text(json.dumps(content))


def load(directory: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel | Path, tokens: torch.Tensor) -> torch.Tensor:
    return (load(model) if isinstance(model, Path) else model)(tokens).logits


@torch.no_grad()
def logits_by_transformers(source: Path, rope: dict[str, Any], length: int, tokens: torch.Tensor) -> torch.Tensor:
    """Of the ungated model with other fields in its config, as Transformers computes them."""
    config = AutoConfig.from_pretrained(source)
    assert config.model_type != "gated_llama"
    rope = {name: getattr(value, "expected", value) for name, value in rope.items()}  # numbers of approx()
    config.rope_parameters, config.max_position_embeddings = rope, length
    return load(source, config=config)(tokens).logits

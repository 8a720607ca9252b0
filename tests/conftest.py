"""Tiny ungated models and checkpoints of them, and the choice of fast tests."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_gated.conversion import convert_checkpoint
from tests.helpers.source_models import SIZES, SOURCES, randomize


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files without fast tests: importing all files takes longer than the fast tests themselves."""
    if config.option.markexpr == "fast" and collection_path.suffix == ".py":
        return "pytest.mark.fast" not in collection_path.read_text() or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take the fast marker from cases of a parametrized test whose id does not contain its `only`."""
    for item in items:
        marker = item.get_closest_marker("fast")
        if marker is not None and marker.kwargs.get("only", "") not in item.name:
            item.own_markers.remove(marker)


@pytest.fixture(params=list(SOURCES))
def source_config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return SOURCES[request.param]()


@pytest.fixture
def source_model(source_config: PreTrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(source_config)
    randomize(model)
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two sequences of 33 tokens, none of them 0 (padding): more than any sliding window here."""
    return torch.randint(1, SIZES["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint in one file, with a side file."""
    model = AutoModelForCausalLM.from_config(SOURCES["llama, tied"]())
    randomize(model)
    model.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "llama"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint in several shards."""
    model = AutoModelForCausalLM.from_config(SOURCES["llama, biases, llama3 rope"]())
    randomize(model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


@pytest.fixture
def gated(llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama checkpoint, converted."""
    convert_checkpoint(llama, tmp_path / "gated", place="copy")
    return tmp_path / "gated"

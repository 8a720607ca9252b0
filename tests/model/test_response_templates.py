"""`transformers serve` finds tool calls and reasoning in a gated model's output as in its source's."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.cli.serving import utils

from modeling_gated import GatedLlamaConfig
from modeling_gated.conversion import convert_checkpoint
from tests.helpers.processes import run_isolated
from tests.helpers.source_models import SIZES
from tests.helpers.tokenizer_files import write_tokenizer


SOURCES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]


def template(config: PreTrainedConfig, tokenizer: object = None) -> dict | None:
    return utils.get_response_template(tokenizer, SimpleNamespace(config=config))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.model_type)
def test_serve_takes_the_template_of_the_source(source: type[PreTrainedConfig]) -> None:
    config = source(**SIZES, head_dim=8)
    gated = GatedLlamaConfig.from_source_config(config)
    assert template(gated) == template(config)
    assert (template(gated) is None) == (not source.model_type.startswith("qwen"))
    tokenizer = SimpleNamespace(response_template={"fields": {}})
    assert template(gated, tokenizer) == {"fields": {}}
    assert template(GatedLlamaConfig()) is None  # from scratch, or converted by an earlier version


@pytest.mark.parametrize("source", [LlamaConfig, Qwen3Config], ids=lambda source: source.model_type)
def test_the_code_in_a_checkpoint_does_so_without_the_package(tmp_path: Path, source: type[PreTrainedConfig]) -> None:
    AutoModelForCausalLM.from_config(source(**SIZES, head_dim=8)).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    done = run_isolated("print_response_template.py", tmp_path / "gated")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == template(source())


@pytest.mark.parametrize("is_package", [True, False], ids=["package", "carried code"])
def test_serve_loads_a_gated_checkpoint(tmp_path: Path, is_package: bool) -> None:
    """It looks for the class under its name in `transformers`."""
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    write_tokenizer(tmp_path / "gated", "byte-level")
    code = "package" if is_package else "carried"
    done = run_isolated("serve_checkpoint.py", tmp_path / "gated", code, is_package=is_package)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "GatedLlamaForCausalLM 9"

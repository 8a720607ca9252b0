"""Continued pre-training sharded over processes is what it is in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from examples.recipes import continue_pretraining
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.processes import PROGRAMS
from tests.helpers.tiny_configs import tiny_llama


EXAMPLES = Path(continue_pretraining.__file__).parents[1]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny Llama with tied embeddings, whose training a text of numbers is."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tiny_llama(vocab_size=258, bos_token_id=256, eos_token_id=257, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text(" ".join(map(str, range(2000))), encoding="utf-8")
    values = {
        "model": folder / "tiny",
        "text": folder / "text.txt",
        "steps": 6,
        "length": 32,
        "learning_rate": 0.003,
        "gate_learning_rate": 0.03,
        "seeds": 0,
        "save_every": 3,
        "evaluation_windows": 2,
        "mixed_precision": "no",
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(("name", "kind"), [("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")])
def test_configurations_are_accelerate_s(name: str, kind: str) -> None:
    config = load_config_from_file(str(EXAMPLES / "shared" / f"accelerate_{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == 8


def run_sharded(output: Path, flags: list[str], **environment: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += [str(PROGRAMS / "fsdp_on_cpu.py")]
    result = subprocess.run(
        [*launcher, EXAMPLES / "recipes" / "continue_pretraining.py", "--output", output, *flags, "--batch_size", "1"],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=300,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))["losses"]


def test_fsdp_over_two_processes_is_training_in_one(flags: list[str], tmp_path: Path) -> None:
    """By examples/shared/accelerate_fsdp2.yaml: the same losses, and checkpoints that load without FSDP."""
    settings = yaml.safe_load((EXAMPLES / "shared" / "accelerate_fsdp2.yaml").read_text(encoding="utf-8"))
    assert settings["distributed_type"] == "FSDP"
    fsdp = {name.upper(): str(value).lower() for name, value in settings["fsdp_config"].items()}
    fsdp |= {name: fsdp[name].upper() for name in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE")}
    run_sharded(tmp_path / "two", flags, ACCELERATE_USE_FSDP="true", ACCELERATE_TORCH_DEVICE="cpu", **fsdp)
    AcceleratorState._reset_state(reset_partial_state=True)
    continue_pretraining.main(["--output", str(tmp_path / "one"), *flags, "--batch_size", "2"])
    for name in ("gated-seed0", "control-seed0"):
        one, two = losses(tmp_path / "one" / name), losses(tmp_path / "two" / name)
        assert len(two) == 6
        assert two == pytest.approx(one, abs=1e-4)
        assert one[-1] < one[0] - 0.1
        expected, actual = (load_file(tmp_path / part / name / "model.safetensors") for part in ("one", "two"))
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=0, atol=2e-3)
        AutoModelForCausalLM.from_pretrained(tmp_path / "two" / name)

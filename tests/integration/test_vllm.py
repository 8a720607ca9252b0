"""
vLLM says what Transformers does, with gates that are not 1: headwise and elementwise, eager and compiled, in one
process and split over two, by the checkpoint's own code and by this package's entry point.

It needs an environment of its own, which `make test-vllm` makes: VLLM_PYTHON is its interpreter, VLLM_PACKAGE a folder
with this package installed in it, which that interpreter finds nowhere else.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_gated.conversion import convert_checkpoint
from tests.helpers.gated_models import gated_model
from tests.helpers.processes import PROGRAMS


VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
SMOLLM2 = Path(__file__).parents[2] / "build" / "demo" / "SmolLM2-135M-Instruct"
SCRIPT = PROGRAMS / "vllm_generate.py"
NEW_TOKENS = 24

pytestmark = pytest.mark.skipif(VLLM_PYTHON is None, reason="vLLM needs an environment of its own: make test-vllm")


@dataclass(frozen=True)
class Expected:
    checkpoint: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


def expected_of(model: torch.nn.Module, checkpoint: Path, vocabulary: int) -> Expected:
    """What Transformers generates of random prompts of several lengths, all at once in vLLM, one by one here."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, vocabulary, (1, length), generator=generator) for length in (5, 17, 60)]
    tokens, logprobs = [], []
    for prompt in prompts:
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        actual = model.generate(prompt, **options, return_dict_in_generate=True, output_logits=True)
        tokens.append(actual.sequences[0, prompt.shape[1] :].tolist())
        logprobs.append([logits[0].log_softmax(-1).max().item() for logits in actual.logits])
    return Expected(checkpoint, [prompt[0].tolist() for prompt in prompts], tokens, logprobs)


@pytest.fixture(scope="module", params=["headwise", "elementwise"])
def smollm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """SmolLM2-135M-Instruct, converted, its gates moved; 9 heads and 3 key-value heads, which two cannot share."""
    folder = tmp_path_factory.mktemp("smollm2")
    convert_checkpoint(SMOLLM2, folder / "converted", granularity=request.param)
    model = AutoModelForCausalLM.from_pretrained(folder / "converted", dtype=torch.float32)
    return moved_gates(model, folder / request.param)


@pytest.fixture(scope="module", params=["headwise", "elementwise"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """A random model whose heads two processes can share."""
    model = gated_model(request.param, num_attention_heads=4, head_dim=32)  # the least that vLLM's attention takes
    return moved_gates(model, tmp_path_factory.mktemp("tiny") / request.param)


def moved_gates(model: torch.nn.Module, folder: Path) -> Expected:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "g_proj" in name:
                scale = 1.0 if name.endswith("bias") else 2 / parameter.shape[1] ** 0.5
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.eval().save_pretrained(folder)
    return expected_of(model, folder, model.config.vocab_size)


def generated(expected: Expected, folder: Path, by: str, **options: object) -> dict:
    """By vLLM, with this package (`by` = "package") or with the checkpoint's code ("trust_remote_code")."""
    trusts = by == "trust_remote_code"
    model = {"model": str(expected.checkpoint), "skip_tokenizer_init": True, "trust_remote_code": trusts, **options}
    job = {"model": model, "prompts": expected.prompts, "tokens": NEW_TOKENS}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    if not trusts:
        environment |= {"PYTHONPATH": os.environ["VLLM_PACKAGE"]}
    if options.get("tensor_parallel_size") == 2:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    result = subprocess.run(
        [str(VLLM_PYTHON), SCRIPT, folder / "job.json", folder / "out.json"],
        env=environment,
        cwd=folder,  # where there is no package to import
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-20000:]
    content = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert content["config_module"].split(".")[0] == ("transformers_modules" if trusts else "modeling_gated")
    return content


def check(expected: Expected, actual: dict) -> None:
    assert actual["tokens"] == expected.tokens
    for one, other in zip(actual["logprobs"], expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


WAYS = list(product(["trust_remote_code", "package"], ["eager", "compiled"]))


@pytest.mark.parametrize(("by", "mode"), WAYS)
def test_smollm2_in_one_process(smollm2: Expected, tmp_path: Path, by: str, mode: str) -> None:
    check(smollm2, generated(smollm2, tmp_path, by, enforce_eager=mode == "eager"))


@pytest.mark.parametrize(("by", "mode"), WAYS)
def test_two_processes_share_the_heads(tiny: Expected, tmp_path: Path, by: str, mode: str) -> None:
    check(tiny, generated(tiny, tmp_path, by, enforce_eager=mode == "eager", tensor_parallel_size=2))

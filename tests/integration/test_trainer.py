"""Trainer treats the model as it treats Llama."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from tests.helpers.tiny_configs import tiny_llama


def test_label_smoothing_shifts_the_labels(tmp_path: Path) -> None:
    """Trainer smooths causal language models' labels one token on, and all others' in place."""
    torch.manual_seed(0)
    config = tiny_llama()
    llama = LlamaForCausalLM(config)
    gated = GatedLlamaForCausalLM(GatedLlamaConfig.from_source_config(config))
    gated.load_state_dict(llama.state_dict(), strict=False)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    inputs = {"input_ids": torch.arange(1, 25).reshape(2, 12)}
    inputs["labels"] = inputs["input_ids"]
    expected, actual = (Trainer(model, arguments).compute_loss(model, dict(inputs)) for model in (llama, gated))
    assert torch.equal(actual, expected)
    expected.backward()
    actual.backward()
    assert torch.equal(gated.model.embed_tokens.weight.grad, llama.model.embed_tokens.weight.grad)

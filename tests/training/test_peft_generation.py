"""Cached generation with PEFT: right, or refused where PEFT itself would lose the cache."""

import copy
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    CPTConfig,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShadowConfig,
    get_peft_model,
)
from transformers import LlamaForCausalLM

from tests.helpers.cache_by_version import NAME
from tests.helpers.gated_models import gated_model
from tests.helpers.tiny_configs import tiny_llama


PROMPT_LEARNING: dict[str, dict[str, Any]] = {
    "prefix tuning": {"class": PrefixTuningConfig, "num_virtual_tokens": 4},
    "prompt tuning": {"class": PromptTuningConfig, "num_virtual_tokens": 4},
    "P-tuning": {"class": PromptEncoderConfig, "num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "Shadow": {"class": ShadowConfig, "shadow_alpha": 1.0},
    "CPT": {
        "class": CPTConfig,
        "cpt_token_ids": [1, 2, 3],
        "cpt_mask": [1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 3],
    },
}
TUNED: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    "LoRA, gates in full": LoraConfig(
        target_modules=["q_proj"], modules_to_save=["g_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    ),
    "gates": LNTuningConfig(target_modules=["g_proj"], task_type="CAUSAL_LM"),
}
# PEFT 0.22, which is not released yet, is to know the cache's name in Transformers 5.24.
PEFT_LOSES_THE_CACHE = NAME == "cache" and Version(version("peft")) < Version("0.22.0.dev0")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
IDS = torch.arange(1, 10)[None]


def greedy_by_full_passes(model: PeftModel) -> torch.Tensor:
    tokens = IDS
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def generated(model: PeftModel, **options: Any) -> torch.Tensor:
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY, **options)


@pytest.mark.parametrize("method", list(PROMPT_LEARNING))
def test_prompt_learning_is_right_or_refused(method: str) -> None:
    options = dict(PROMPT_LEARNING[method])
    torch.manual_seed(0)
    model = get_peft_model(gated_model(), options.pop("class")(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():  # an adapter that is new may change nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = greedy_by_full_passes(model)
    assert torch.equal(generated(model, use_cache=False), expected)
    if PEFT_LOSES_THE_CACHE:
        with pytest.raises(ValueError, match=r"must generate with use_cache=False: PEFT 0\.\S+ loses the KV cache"):
            generated(model)
    else:
        assert torch.equal(generated(model), expected)


def test_shadow_models_are_copied_and_switched_off() -> None:
    """Gated or not. Without the adapter there is nothing to refuse."""
    config = tiny_llama(pad_token_id=0)
    for base in (LlamaForCausalLM(config), gated_model()):
        expected = base.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
        model = get_peft_model(base, ShadowConfig(task_type="CAUSAL_LM", shadow_alpha=1.0)).eval()
        copy.deepcopy(model)
        pickle.dumps(model)
        with model.disable_adapter():
            assert torch.equal(generated(model), expected)


def test_models_of_others_are_left_alone() -> None:
    """PEFT's fault with them is not ours to report."""
    config = tiny_llama(pad_token_id=0)
    model = get_peft_model(LlamaForCausalLM(config), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert generated(model.eval()).shape == (1, 15)


@pytest.mark.parametrize("kind", list(TUNED))
def test_adapters_generate_with_their_cache(kind: str, tmp_path: Path) -> None:
    """By get_peft_model, PeftModel, AutoPeftModel and PeftModel.load_adapter; and merged."""
    gated_model().save_pretrained(tmp_path / "base")
    base = type(gated_model()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, TUNED[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = greedy_by_full_passes(model)
    assert torch.equal(generated(model), expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(generated(loaded), expected)
    assert torch.equal(generated(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), expected)
    loaded.load_adapter(tmp_path / "adapter", adapter_name="second")
    loaded.set_adapter("second")
    assert torch.equal(generated(loaded.eval()), expected)
    assert torch.equal(generated(loaded.merge_and_unload()), expected)


def test_transformers_own_integration_works_or_says_what_it_needs(tmp_path: Path) -> None:
    model, config = gated_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    if PEFT_LOSES_THE_CACHE:
        with pytest.raises(ValueError, match=r"please use a version >= 0\.22"):
            model.add_adapter(config)
    else:
        model.add_adapter(config)
        assert any("lora_A" in name for name, _ in model.named_parameters())
    get_peft_model(gated_model(), config).save_pretrained(tmp_path)
    fresh = gated_model()
    fresh.load_adapter(tmp_path)
    assert any("lora_A" in name for name, _ in fresh.named_parameters())

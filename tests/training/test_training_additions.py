"""Accelerate and Trainer say so where they would train another model, or without the kernels that were asked for."""

from types import SimpleNamespace

import pytest
import transformers
from accelerate.utils import MegatronLMPlugin
from accelerate.utils import dataclasses as accelerate_dataclasses
from transformers import LlamaConfig, LlamaForCausalLM, trainer

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM, training_additions
from tests.helpers.source_models import SIZES


def test_megatron_does_not_take_a_gated_model_for_a_llama() -> None:
    plugin = MegatronLMPlugin.__new__(MegatronLMPlugin)
    with pytest.raises(ValueError, match="would train a Llama without gates; use FSDP or DeepSpeed"):
        plugin.set_network_size_args(SimpleNamespace(config=GatedLlamaConfig(**SIZES)))


def test_megatron_still_knows_the_others() -> None:
    parsers = accelerate_dataclasses.MODEL_CONFIGS_TO_MEGATRON_PARSERS
    assert next(iter(parsers)) == "gated_llama" and {"llama", "gpt2", "t5"} <= parsers.keys()


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "llama"])
def test_liger_has_no_effect_and_says_so(is_gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES)) if is_gated else LlamaForCausalLM(LlamaConfig(**SIZES))
    warnings: list[str] = []
    monkeypatch.setattr(training_additions.logger, "warning_once", warnings.append)
    with pytest.raises(ImportError, match="liger-kernel"):  # not installed here: the warning comes first
        trainer.apply_liger_kernel(model, None)
    assert bool(warnings) == is_gated


@pytest.mark.parametrize(
    "name",
    [
        "GatedLlamaForCausalLM",
        "GatedLlamaForSequenceClassification",
        "GatedLlamaForTokenClassification",
        "GatedLlamaForQuestionAnswering",
    ],
)
def test_classes_are_found_by_name_as_serve_finds_them(name: str) -> None:
    assert getattr(transformers, name).config_class is GatedLlamaConfig

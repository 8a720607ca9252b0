"""Adapters of gated models: saved, loaded, merged, switched, averaged and swapped."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.configuration.configuration_gated_llama import CARRIED_MODULES
from modeling_gated.training import gate_peft_config
from tests.helpers.close_tensors import assert_close
from tests.helpers.gated_models import SIZES, gated_model
from tests.helpers.peft_names import gate_names, unwrapped
from tests.helpers.processes import run_isolated


TOKENS = torch.arange(1, 41)[None]
ALL_POSITIONS = ["G1", "G2", "G3", "G4", "G5"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=8, **options)


KINDS: dict[str, Callable[[], PeftConfig]] = {
    "gates": gate_peft_config,
    "LoRA and gates": lambda: gate_peft_config(lora()),
    "LoRA": lambda: gate_peft_config(lora(), gates="frozen"),
}


def train(model: nn.Module, seed: int = 0, lr: float = 1e-2) -> None:
    """A few steps on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    model.train()
    for _ in range(4):
        tokens = torch.randint(1, SIZES["vocab_size"], (2, 16), generator=generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits.float()


@dataclass
class Trained:
    """A base model's directory, and of each kind an adapter's, its weights and its logits, two times."""

    base: Path
    adapters: dict[tuple[str, int], Path]
    weights: dict[tuple[str, int], dict[str, torch.Tensor]]
    logits: dict[tuple[str, int], torch.Tensor]

    def new_base(self, **options: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base, **options)

    def loaded(self, kind: str, number: int = 0) -> PeftModel:
        return PeftModel.from_pretrained(self.new_base(), self.adapters[kind, number])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("adapters")
    result = Trained(root / "base", {}, {}, {})
    gated_model().save_pretrained(result.base)
    for kind, make in KINDS.items():
        for number in range(2):
            torch.manual_seed(number)
            model = get_peft_model(result.new_base(), make())
            train(model, number)
            key = kind, number
            result.adapters[key] = root / f"{kind} {number}"
            model.save_pretrained(result.adapters[key])
            result.weights[key] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            result.logits[key] = logits_of(model)
    return result


def trained_gates(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What PEFT's forward passes use of a state dict, by the names in the model that is not PEFT's."""
    gates = {name: tensor for name, tensor in weights.items() if "g_proj" in name}
    trained = {name: tensor for name, tensor in gates.items() if ".default." in name} or gates
    return {unwrapped(name, "modules_to_save.", "ln_tuning_layers."): tensor for name, tensor in trained.items()}


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_changes_what_it_should(kind: str, trained: Trained) -> None:
    base = trained.new_base().state_dict()
    gates = trained_gates(trained.weights[kind, 0])
    assert gates.keys() == gate_names(trained.new_base())
    for name, tensor in gates.items():
        assert torch.equal(tensor, base[name]) == (kind == "LoRA"), name
    assert (trained.logits[kind, 0] - logits_of(trained.new_base())).abs().max() > 0.01


@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModelForCausalLM"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_loaded_adapter_is_the_saved_one(kind: str, way: str, trained: Trained) -> None:
    if way == "PeftModel":
        model = trained.loaded(kind)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(trained.adapters[kind, 0])
    actual, expected = model.state_dict(), trained.weights[kind, 0]
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert_close(logits_of(model), trained.logits[kind, 0])


def test_merged_models_keep_their_gates_and_load_without_the_package(trained: Trained, tmp_path: Path) -> None:
    for kind in KINDS:
        merged = trained.loaded(kind).merge_and_unload()
        assert type(merged) is GatedLlamaForCausalLM
        assert not [name for name, _ in merged.named_modules() if "lora" in name or "ln_tuning" in name]
        for name, tensor in trained_gates(trained.weights[kind, 0]).items():
            assert torch.equal(merged.get_parameter(name), tensor), name
        assert_close(logits_of(merged), trained.logits[kind, 0])
        path = tmp_path / "merged" / kind
        merged.save_pretrained(path)
        assert {file.name for file in path.glob("*.py")} == CARRIED_MODULES.keys()
        auto_map = json.loads((path / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModelForCausalLM"] == "modeling_gated_llama.GatedLlamaForCausalLM"
    finished = run_isolated("logits_of_checkpoints.py", tmp_path / "merged", tmp_path / "logits")
    assert finished.returncode == 0, finished.stderr
    logits = torch.load(tmp_path / "logits")
    assert logits.keys() == KINDS.keys()
    for kind in KINDS:
        assert_close(logits[kind], trained.logits[kind, 0])


@pytest.mark.parametrize("kind", ["gates", "LoRA and gates"])
def test_float32_gates_of_a_bfloat16_base_are_kept(kind: str, tmp_path: Path) -> None:
    """After steps too small for bfloat16."""
    gated_model().bfloat16().save_pretrained(tmp_path / "base")
    options = {"gate_dtype": "float32", "dtype": torch.bfloat16}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options), KINDS[kind]())
    train(model, lr=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    expected = trained_gates(model.state_dict())
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32}
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in expected.values())
    assert model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    for loaded in (
        PeftModel.from_pretrained(base, tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", gate_dtype="float32"),
    ):
        actual = loaded.state_dict()
        assert actual.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name
        for name, tensor in expected.items():
            assert torch.equal(loaded.merge_and_unload().get_parameter(name), tensor), name


def test_a_small_model_s_gates_take_less_than_a_megabyte(tmp_path: Path) -> None:
    """Those of SmolLM2-135M's shapes; what is no part of the adapter is small here."""
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**sizes, vocab_size=8, intermediate_size=8))
    get_peft_model(model, gate_peft_config()).save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*"))
    assert 4 * 30 * 9 * 577 < size < 1_000_000


def lora_product(weights: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """What LoRA adds to a weight, in float64."""
    prefix = f"base_model.model.{module}"
    down, up = (weights[f"{prefix}.lora_{letter}.default.weight"].double() for letter in "AB")
    return (8 / 4) * up @ down


@pytest.mark.parametrize(("combination", "rank"), [("cat", None), ("svd", 8)])
def test_weighted_sums_of_lora_adapters(combination: str, rank: int | None, trained: Trained) -> None:
    model = trained.loaded("LoRA", 0)
    model.load_adapter(trained.adapters["LoRA", 1], "other")
    names = ["default", "other"]
    model.add_weighted_adapter(names, [0.7, -0.4], "sum", combination_type=combination, svd_rank=rank)
    model.set_adapter("sum")
    expected = trained.new_base()
    modules = {name for name, module in expected.named_modules() if isinstance(module, nn.Linear)}
    modules = {name for name in modules if "g_proj" not in name and name != "lm_head"}
    assert len(modules) == 7 * SIZES["num_hidden_layers"]
    for name in modules:
        products = [lora_product(trained.weights["LoRA", number], name) for number in range(2)]
        added = 0.7 * products[0] - 0.4 * products[1]
        layer = model.base_model.model.get_submodule(name)
        actual = layer.scaling["sum"] * layer.lora_B["sum"].weight.double() @ layer.lora_A["sum"].weight.double()
        torch.testing.assert_close(actual, added, rtol=1e-4, atol=1e-6)
        weight = expected.get_parameter(f"{name}.weight")
        weight.data = (weight.double() + added).float()
    assert_close(logits_of(model), logits_of(expected))
    assert (logits_of(expected) - trained.logits["LoRA", 0]).abs().max() > 0.01


def test_lora_adapters_are_exchanged_in_place(trained: Trained) -> None:
    model = trained.loaded("LoRA", 0)
    hotswap_adapter(model, trained.adapters["LoRA", 1], "default", torch_device="cpu")
    for name, tensor in trained.weights["LoRA", 1].items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert_close(logits_of(model), trained.logits["LoRA", 1])
    assert (trained.logits["LoRA", 0] - trained.logits["LoRA", 1]).abs().max() > 0.01


REFUSED = {
    ("gates", "sum"): (ValueError, "PEFT can neither average"),
    ("LoRA and gates", "sum"): (ValueError, "modules_to_save"),
    ("gates", "exchange"): (ValueError, "only supports LORA"),
    ("LoRA and gates", "exchange"): (ValueError, r"self_attn\.g_proj: PEFT can neither average"),
}


@pytest.mark.parametrize(("kind", "way"), list(REFUSED))
def test_peft_refuses_to_mix_gates_and_changes_nothing(kind: str, way: str, trained: Trained) -> None:
    model = trained.loaded(kind, 0)
    model.load_adapter(trained.adapters[kind, 1], "other")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    error, message = REFUSED[kind, way]
    with pytest.raises(error, match=message):
        if way == "sum":
            model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", combination_type="cat")
        else:
            hotswap_adapter(model, trained.adapters[kind, 1], "default", torch_device="cpu")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.peft_config.keys() == {"default", "other"}
    assert model.active_adapter == "default"
    assert_close(logits_of(model), trained.logits[kind, 0])


@pytest.mark.parametrize("kind", list(KINDS))
def test_adapters_are_switched_and_switched_off(kind: str, trained: Trained) -> None:
    model = trained.loaded(kind, 0)
    model.load_adapter(trained.adapters[kind, 1], "other")
    for name, number in (("other", 1), ("default", 0)):
        model.set_adapter(name)
        assert_close(logits_of(model), trained.logits[kind, number])
    with model.disable_adapter():
        assert_close(logits_of(model), logits_of(trained.new_base()))
    assert math.isfinite(logits_of(model).sum().item())


def test_swapping_gates_in_full_into_plain_lora_is_refused(trained: Trained) -> None:
    model = trained.loaded("LoRA", 0)
    with pytest.raises(ValueError, match=r"g_proj.*PEFT can neither average"):
        hotswap_adapter(model, trained.adapters["LoRA and gates", 1], "default", torch_device="cpu")
    assert_close(logits_of(model), trained.logits["LoRA", 0])


def test_tuning_norms_has_no_error_about_gates() -> None:
    model = get_peft_model(gated_model(), LNTuningConfig())
    with pytest.raises(AttributeError, match="has no add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_adapters_of_float32_gates_name_a_base_that_has_them(tmp_path: Path) -> None:
    """A checkpoint whose config says so; AutoPeftModelForCausalLM needs no flag then."""
    base = gated_model().bfloat16()
    base.config.gate_dtype = "float32"
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), gate_peft_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    actual, expected = (dict(either.named_parameters()) for either in (loaded, model))
    trained_names = [name for name in expected if "ln_tuning_layers" in name]
    assert len(trained_names) == 6
    for name in trained_names:
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], expected[name])

"""Gates in PEFT: its defaults for the model, and what is trained."""

import copy
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.peft_additions import add_default_target_modules
from modeling_gated.training import gate_peft_config
from tests.helpers.gated_models import SIZES, gated_model
from tests.helpers.peft_names import gate_names, unwrapped
from tests.helpers.processes import run_program


TOKENS = torch.arange(1, 41)[None]
ALL_POSITIONS = ["G1", "G2", "G3", "G4", "G5"]


def test_peft_s_tables_have_the_model() -> None:
    """Whichever of the two packages is imported first."""
    finished = run_program("peft_tables.py")
    assert finished.returncode == 0, finished.stderr
    package_first, peft_first = json.loads(finished.stdout.splitlines()[-1])
    assert len(package_first) > 5
    for name, (llama, gated) in package_first.items():
        assert gated == llama, name
        assert peft_first[name] == [llama, ["kept"] if "IA3_TARGET" in name else llama], name
    assert package_first["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"][1] == ["q_proj", "v_proj"]


@pytest.mark.fast
@pytest.mark.parametrize("method", [IA3Config, LNTuningConfig, LoraConfig, AdaLoraConfig])
@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_default_targets_are_the_source_s(family: Any, method: Any) -> None:
    """Qwen's are others for IA3 and LayerNorm tuning; a Mistral has none for AdaLoRA, so that it is Llama's."""
    config = family(**SIZES, head_dim=8)
    options = {"total_step": 10} if method is AdaLoraConfig else {}
    gated = get_peft_model(GatedLlamaForCausalLM(GatedLlamaConfig.from_source_config(config)), method(**options))
    known = LlamaConfig(**SIZES) if (family, method) == (MistralConfig, AdaLoraConfig) else config
    source = get_peft_model(AutoModelForCausalLM.from_config(known), method(**options))
    assert gated.active_peft_config.target_modules == source.active_peft_config.target_modules


def test_only_tables_of_models_that_have_llama_are_added_to() -> None:
    constants = ModuleType("constants")
    tables: dict[str, Any] = {
        "TRANSFORMERS_MODELS_TO_A": {"llama": ["a"]},
        "TRANSFORMERS_MODELS_TO_B": {"llama": ["b"], "gated_llama": ["kept"]},
        "TRANSFORMERS_MODELS_TO_C": {"gpt2": ["c"]},
        "TRANSFORMERS_MODELS_TO_D": ["llama"],
        "OTHER": {"llama": ["e"]},
    }
    expected = copy.deepcopy(tables)
    expected["TRANSFORMERS_MODELS_TO_A"]["gated_llama"] = ["a"]
    vars(constants).update(tables)
    add_default_target_modules(constants)
    assert {name: vars(constants)[name] for name in tables} == expected


@pytest.mark.parametrize("make", [LoraConfig, IA3Config])
def test_peft_targets_what_it_targets_in_llama(make: Callable[[], PeftConfig]) -> None:
    models = [gated_model(), LlamaForCausalLM(LlamaConfig(**SIZES))]
    gated, llama = (trainable(get_peft_model(model, make())) for model in models)
    assert gated == llama


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def modules_of(names: set[str], infix: str) -> set[str]:
    """The last names of the modules that have a parameter of which `part` is a part of the name."""
    return {name.split(infix)[0].rsplit(".", 1)[-1] for name in names if infix in name}


POSITIONS = {
    "G1": {},
    "G1 and G2": {"gate_position": ["G1", "G2"]},
    "G5": {"gate_position": ["G5"], "gate_granularity": "elementwise"},
    "all": {"gate_position": ALL_POSITIONS, "gate_granularity": "elementwise"},
    "input-independent": {"gate_position": ["G1", "G3"], "gate_input_independent": True},
}
PROJECTIONS = {"G1": "g_proj", "G2": "g_v_proj", "G3": "g_k_proj", "G4": "g_q_proj", "G5": "g_o_proj"}


def model_with_gates(name: str) -> tuple[PreTrainedModel, tuple[str, ...], dict[str, Any]]:
    """A model, the names of its gates' layers and what `gate_peft_config` has to know of it."""
    options = POSITIONS[name]
    torch.manual_seed(0)
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES | options))
    positions = options.get("gate_position", ["G1"])
    told = {"gate_position": positions} if "gate_position" in options else {}
    return model, tuple(PROJECTIONS[position] for position in positions), told


@pytest.mark.fast
@pytest.mark.parametrize("positions", list(POSITIONS))
def test_gates_alone_are_trained_in_full(positions: str) -> None:
    model, layers, told = model_with_gates(positions)
    gates = gate_names(model, layers)
    assert gates
    names = trainable(get_peft_model(model, gate_peft_config(**told)))
    assert {unwrapped(name, "ln_tuning_layers.") for name in names} == gates
    assert len(names) == len(gates)


EVERY_PROJECTION = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
BASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, {"q_proj", "v_proj"}),
    "list": ({"target_modules": ["k_proj", "up_proj"]}, {"k_proj", "up_proj"}),
    "all-linear": ({"target_modules": "all-linear"}, EVERY_PROJECTION),
    "expression": ({"target_modules": r".*_proj"}, EVERY_PROJECTION),
    "all-linear but a list": (
        {"target_modules": "all-linear", "exclude_modules": ["v_proj", "down_proj"]},
        EVERY_PROJECTION - {"v_proj", "down_proj"},
    ),
    "all-linear but an expression": (
        {"target_modules": "all-linear", "exclude_modules": r".*\.[vk]_proj"},
        EVERY_PROJECTION - {"v_proj", "k_proj"},
    ),
    "expression but an expression": (
        {"target_modules": r".*_proj", "exclude_modules": r".*\.mlp\.up_proj|.*q_proj"},
        EVERY_PROJECTION - {"up_proj", "q_proj"},
    ),
    "list but a list": ({"target_modules": ["k_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {"k_proj"}),
}


@pytest.mark.parametrize("gates", ["full", "frozen"])
@pytest.mark.parametrize("positions", ["G1", "all"])
@pytest.mark.parametrize("base", list(BASES))
def test_lora_is_where_it_was_and_never_on_a_gate(base: str, positions: str, gates: Any) -> None:
    options, targets = BASES[base]
    model, layers, told = model_with_gates(positions)
    own_gates = gate_names(model, layers)
    names = trainable(get_peft_model(model, gate_peft_config(LoraConfig(**options), gates, **told)))
    in_full = {name for name in names if "modules_to_save" in name}
    assert {unwrapped(name, "modules_to_save.") for name in in_full} == (own_gates if gates == "full" else set())
    assert modules_of(names, ".lora_") == targets
    assert names - in_full == {name for name in names if ".lora_" in name}


def test_gates_are_full_by_default() -> None:
    assert gate_peft_config(LoraConfig()).modules_to_save == ["g_proj"]


@pytest.mark.parametrize("gates", ["full", "frozen"])
def test_other_modules_to_save_are_kept(gates: Any) -> None:
    base = LoraConfig(modules_to_save=["lm_head", "embed_tokens"])
    names = trainable(get_peft_model(gated_model(), gate_peft_config(base, gates)))
    expected = {"lm_head", "embed_tokens"} | ({"g_proj"} if gates == "full" else set())
    assert modules_of(names, ".modules_to_save") == expected


@pytest.mark.parametrize("gates", ["full", "frozen"])
@pytest.mark.parametrize("base", list(BASES))
def test_the_base_config_is_not_changed(base: str, gates: Any) -> None:
    config = LoraConfig(**BASES[base][0], modules_to_save=["lm_head"], r=3)
    before = copy.deepcopy(config.to_dict())
    derived = gate_peft_config(config, gates)
    assert config.to_dict() == before
    assert type(derived) is LoraConfig
    changed = {name for name, value in derived.to_dict().items() if value != before[name]}
    assert changed <= {"modules_to_save", "exclude_modules"}


def test_other_methods_than_lora() -> None:
    model = get_peft_model(gated_model(), gate_peft_config(IA3Config()))
    names = trainable(model)
    in_full = {name for name in names if "modules_to_save" in name}
    assert len(in_full) == 2 * SIZES["num_hidden_layers"]
    assert modules_of(names, ".ia3_") == {"k_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "open"}, "got 'open'"),
        ({"gates": "frozen"}, "nothing would be trained"),
        ({"gate_position": ["G1", "G6"]}, "gate_position must be among G1, G2, G3, G4, G5, got 'G6'"),
        ({"gate_position": []}, "no gate to train"),
        ({"gate_position": [], "base": LoraConfig()}, "no gate to train"),
        ({"base": LoraConfig(target_modules=["q_proj", "g_proj"])}, "base.target_modules must not include 'g_proj'"),
        (
            {"base": LoraConfig(target_modules=["self_attn.g_v_proj"])},
            "base.target_modules must not include 'self_attn.g_v_proj'",
        ),
        ({"base": LoraConfig(modules_to_save=["g_proj"])}, "base.modules_to_save must not include 'g_proj'"),
        (
            {"base": LoraConfig(target_parameters=["g_proj.weight"]), "gates": "frozen"},
            "base.target_parameters must not include 'g_proj.weight'",
        ),
        ({"base": LoraConfig(bias="all"), "gates": "frozen"}, "base.bias='all' with gates='frozen'"),
        (
            {"base": LoraConfig(modules_to_save=["g_proj"]), "gates": "frozen"},
            "base.modules_to_save must not include 'g_proj'",
        ),
        ({"base": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "base must have target"),
        (
            {"base": AdaptionPromptConfig(adapter_len=2, adapter_layers=1)},
            "base must have modules_to_save, got AdaptionPromptConfig",
        ),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        gate_peft_config(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_of_an_expression_stay_at_its_start() -> None:
    config = gate_peft_config(LoraConfig(target_modules=r".*_proj", exclude_modules=r"(?i).*V_PROJ"), "frozen")
    model = get_peft_model(gated_model(), config)
    adapted = {name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters()} - {""}
    assert adapted == {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

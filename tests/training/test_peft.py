"""Gates in PEFT: its defaults for the model, gates trained in full, adapters saved, loaded, merged and mixed."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from close_tensors import assert_close
from gated_models import SIZES, gated_model
from peft import (
    AdaptionPromptConfig,
    AutoPeftModelForCausalLM,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.peft_additions import add_default_target_modules
from modeling_gated.training import gate_peft_config


TOKENS = torch.arange(1, 41)[None]
ALL_POSITIONS = ["G1", "G2", "G3", "G4", "G5"]

TABLES = """
import json
import sys

def is_imported(package):
    return package in {name.partition(".")[0] for name in sys.modules}

def tables():
    return {name: table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")}

def found():
    return {name: [table["llama"], table.get("gated_llama")] for name, table in tables().items() if "llama" in table}

import modeling_gated
assert not is_imported("peft")
from peft.utils import constants
results = [found()]

for name in [name for name in sys.modules if name.partition(".")[0] == "modeling_gated"]:
    del sys.modules[name]
assert not is_imported("modeling_gated")
for table in tables().values():
    if "llama" in table:
        del table["gated_llama"]
constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["gated_llama"] = ["kept"]
import modeling_gated
print(json.dumps([*results, found()]))
"""


def test_peft_s_tables_have_the_model() -> None:
    """Whichever of the two packages is imported first."""
    finished = subprocess.run([sys.executable, "-c", TABLES], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    package_first, peft_first = json.loads(finished.stdout.splitlines()[-1])
    assert len(package_first) > 5
    for name, (llama, gated) in package_first.items():
        assert gated == llama, name
        assert peft_first[name] == [llama, ["kept"] if "IA3_TARGET" in name else llama], name
    assert package_first["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"][1] == ["q_proj", "v_proj"]


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
    sizes = {name: value for name, value in SIZES.items() if name != "pad_token_id"}
    models = [gated_model(), LlamaForCausalLM(LlamaConfig(**sizes))]
    gated, llama = (trainable(get_peft_model(model, make())) for model in models)
    assert gated == llama


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def modules_of(names: set[str], part: str) -> set[str]:
    """The last names of the modules that have a parameter of which `part` is a part of the name."""
    return {name.split(part)[0].rsplit(".", 1)[-1] for name in names if part in name}


def gate_names(model: nn.Module, names: tuple[str, ...] = ("g_proj",)) -> set[str]:
    """The gates' parameters' names in a model that is not PEFT's."""
    return {name for name, _ in model.named_parameters() if name.split(".")[-2] in names}


def unwrapped(name: str, *parts: str) -> str:
    """A trained copy's parameter's name in the model that is not PEFT's."""
    for part in (*parts, "default."):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


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
        ({"gates": "open"}, "gates='open'"),
        ({"gates": "frozen"}, "nothing would be trained"),
        ({"gate_position": ["G1", "G6"]}, "'G6' is not among G1, G2"),
        ({"gate_position": []}, "no gate to train"),
        ({"gate_position": [], "base": LoraConfig()}, "no gate to train"),
        ({"base": LoraConfig(target_modules=["q_proj", "g_proj"])}, "base.target_modules names 'g_proj'"),
        ({"base": LoraConfig(target_modules=["self_attn.g_v_proj"])}, "base.target_modules names 'self_attn.g_v_proj'"),
        ({"base": LoraConfig(modules_to_save=["g_proj"])}, "base.modules_to_save names 'g_proj'"),
        (
            {"base": LoraConfig(target_parameters=["g_proj.weight"]), "gates": "frozen"},
            "base.target_parameters names 'g_proj.weight'",
        ),
        ({"base": LoraConfig(bias="all"), "gates": "frozen"}, "base.bias='all' with gates='frozen'"),
        ({"base": LoraConfig(modules_to_save=["g_proj"]), "gates": "frozen"}, "base.modules_to_save names 'g_proj'"),
        ({"base": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "PromptTuningConfig has no target"),
        (
            {"base": AdaptionPromptConfig(adapter_len=2, adapter_layers=1)},
            "AdaptionPromptConfig has no modules_to_save",
        ),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        gate_peft_config(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
    own = {name: tensor for name, tensor in gates.items() if ".default." in name} or gates
    return {unwrapped(name, "modules_to_save.", "ln_tuning_layers."): tensor for name, tensor in own.items()}


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
    found, expected = model.state_dict(), trained.weights[kind, 0]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert_close(logits_of(model), trained.logits[kind, 0])


MERGED = """
import sys
from pathlib import Path
sys.modules["modeling_gated"] = None  # any import of the package fails
import torch
from transformers import AutoModelForCausalLM

results = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        results[directory.name] = model(torch.arange(1, 41)[None]).logits
torch.save(results, sys.argv[2])
"""


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
        assert {file.name for file in path.glob("*.py")} == {"configuration_gated_llama.py", "modeling_gated_llama.py"}
        auto_map = json.loads((path / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModelForCausalLM"] == "modeling_gated_llama.GatedLlamaForCausalLM"
    finished = subprocess.run(
        [sys.executable, "-c", MERGED, tmp_path / "merged", tmp_path / "logits"],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
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
        found = loaded.state_dict()
        assert found.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
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
    down, up = (weights[f"{prefix}.lora_{part}.default.weight"].double() for part in "AB")
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
        found = layer.scaling["sum"] * layer.lora_B["sum"].weight.double() @ layer.lora_A["sum"].weight.double()
        torch.testing.assert_close(found, added, rtol=1e-4, atol=1e-6)
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


def test_flags_of_an_expression_stay_at_its_start() -> None:
    config = gate_peft_config(LoraConfig(target_modules=r".*_proj", exclude_modules=r"(?i).*V_PROJ"), "frozen")
    model = get_peft_model(gated_model(), config)
    adapted = {name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters()} - {""}
    assert adapted == {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


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
    found, expected = (dict(part.named_parameters()) for part in (loaded, model))
    trained_names = [name for name in expected if "ln_tuning_layers" in name]
    assert len(trained_names) == 6
    for name in trained_names:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name])

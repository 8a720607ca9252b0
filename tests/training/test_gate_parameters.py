"""Which parameters are gates', and the learning rates and decay that they get."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, Trainer

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.gate_names import is_gate
from modeling_gated.training import gate_param_groups, gate_peft_config
from tests.helpers.gated_models import SIZES, gated_model
from tests.helpers.tiny_configs import tiny_llama


@pytest.mark.fast
@pytest.mark.parametrize(
    "name",
    [
        *(f"model.layers.0.self_attn.{name}" for name in ("g_proj", "g_v_proj", "g_k_proj", "g_q_proj", "g_o_proj")),
        "g_proj.weight",
        "base_model.model.model.layers.0.self_attn.g_proj.modules_to_save.default.bias",
        "base_model.model.model.layers.0.self_attn.g_v_proj.ln_tuning_layers.default.weight",
        "module._fsdp_wrapped_module.model.layers.2.self_attn.g_proj.bias",
    ],
)
def test_names_of_gates(name: str) -> None:
    assert is_gate(name)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.gate_proj.weight", "self_attn.q_proj.weight", "big_g_proj.weight", "g_proj_norm.weight", ""],
)
def test_names_of_others(name: str) -> None:
    assert not is_gate(name)


def with_frozen_base() -> nn.Module:
    model = gated_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("g_proj" in name or "norm" in name)
    return model


def wrapped() -> nn.Module:
    return nn.ModuleDict({"module": gated_model(attention_bias=True)})


def input_independent(positions: list[str]) -> nn.Module:
    return GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, gate_position=positions, gate_input_independent=True))


ALL_POSITIONS = ["G1", "G2", "G3", "G4", "G5"]
INPUT_INDEPENDENT = ("input-independent", "input-independent, G2")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": gated_model,
    "elementwise": lambda: gated_model("elementwise", attention_bias=True, mlp_bias=True),
    "QK-norm, tied": lambda: gated_model("QK-norm, tied"),
    "sandwich and output norms": lambda: gated_model(use_sandwich_norm=True, use_attention_output_norm=True),
    "two positions": lambda: gated_model(gate_position=["G1", "G2"]),
    "five positions": lambda: gated_model("elementwise", gate_position=ALL_POSITIONS),
    "no gate bias": lambda: GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, gate_bias=False)),
    "input-independent": lambda: input_independent(["G1"]),
    "input-independent, G2": lambda: input_independent(["G2"]),
    "frozen base": with_frozen_base,
    "wrapped": wrapped,
    "PEFT, gates": lambda: get_peft_model(gated_model(), gate_peft_config()),
    "PEFT, LoRA and gates": lambda: get_peft_model(gated_model(), gate_peft_config(LoraConfig())),
}


def group_of(groups: list[dict[str, Any]], parameter: nn.Parameter) -> dict[str, Any]:
    (group,) = (group for group in groups if any(member is parameter for member in group["params"]))
    return group


@pytest.mark.fast
@pytest.mark.parametrize("gate_lr", [None, 3e-3])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_parameter_has_its_learning_rate_and_decay(name: str, gate_lr: float | None) -> None:
    model = MODELS[name]()
    groups = gate_param_groups(model, lr=1e-4, gate_lr=gate_lr, weight_decay=0.1)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trainable = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(trainable)
    assert all(group["params"] for group in groups)
    assert all(group.keys() == {"params", "lr", "weight_decay"} for group in groups)
    gates = 0
    for key, parameter in trainable.items():
        group = group_of(groups, parameter)
        of_gate = re.search(r"(^|\.)g_([vkqo]_)?proj\.", key) is not None
        gates += of_gate
        assert group["lr"] == (gate_lr if of_gate and gate_lr is not None else 1e-4), key
        never = of_gate and (key.endswith("bias") or name in INPUT_INDEPENDENT)
        assert group["weight_decay"] == (0.1 if key in decayed and not never else 0.0), key
        if re.search(r"norm|bias", key):
            assert group["weight_decay"] == 0.0, key
    assert gates > 0
    torch.optim.AdamW(groups)


def test_gate_weights_are_decayed_and_input_independent_ones_not() -> None:
    decays = []
    for name in ("plain", "input-independent"):
        model = MODELS[name]()
        groups = gate_param_groups(model, lr=1e-4, weight_decay=0.1)
        decays.append(group_of(groups, model.model.layers[1].self_attn.g_proj.weight)["weight_decay"])
    assert decays == [0.1, 0.0]


def test_gate_groups_come_last() -> None:
    groups = gate_param_groups(gated_model(), lr=1e-4, gate_lr=1e-3, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-4, 0.1),
        (1e-4, 0.0),
        (1e-3, 0.1),
        (1e-3, 0.0),
    ]


def test_nothing_is_decayed_by_default() -> None:
    assert {group["weight_decay"] for group in gate_param_groups(gated_model(), lr=1e-4)} == {0.0}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="requires a gradient"):
        gate_param_groups(gated_model().requires_grad_(False), lr=1e-4)


def test_a_gate_learning_rate_without_a_gate_to_train_is_an_error() -> None:
    model = gated_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("g_proj" not in name)
    with pytest.raises(ValueError, match=r"gate_lr=0\.001.*do not require gradients"):
        gate_param_groups(model, lr=1e-4, gate_lr=1e-3)
    assert len(gate_param_groups(model, lr=1e-4)) == 2


def test_an_ungated_model_has_no_gate_learning_rate() -> None:
    model = LlamaForCausalLM(tiny_llama())
    with pytest.raises(ValueError, match=r"gate_lr=0\.001.*it has no g_"):
        gate_param_groups(model, lr=1e-4, gate_lr=1e-3)
    decayed, undecayed = gate_param_groups(model, lr=1e-4, weight_decay=0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    norms = {id(parameter) for name, parameter in model.named_parameters() if "norm" in name}
    assert {id(parameter) for parameter in undecayed["params"]} == norms
    assert len(decayed["params"]) + len(norms) == len(list(model.parameters()))

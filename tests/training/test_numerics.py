"""Gates move in every precision that models are trained in; and gates that are float32 whatever the model is."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.training import gate_param_groups, keep_float32_states
from tests.helpers.gated_models import SIZES, gated_model
from tests.helpers.processes import run_isolated
from tests.helpers.tiny_configs import tiny_llama


MODES = ["float32", "bfloat16 autocast", "bfloat16, float32 gates", "bfloat16, float32 states", "bfloat16"]
MOVED = 0.005  # mean |gate - 1|
VOCABULARY = 16


def new_model(mode: str, gate_init: float) -> GatedLlamaForCausalLM:
    torch.manual_seed(0)
    source = tiny_llama(vocab_size=VOCABULARY, intermediate_size=64)
    config = GatedLlamaConfig.from_source_config(source, gate_init=gate_init)
    if mode in ("float32", "bfloat16 autocast"):
        return GatedLlamaForCausalLM(config)
    if mode == "bfloat16, float32 gates":
        config.gate_dtype = "float32"
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def batch(step: int) -> torch.Tensor:
    """Sequences whose second half is their first: what is to come is found by attention alone."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(1, VOCABULARY, (8, 8), generator=generator).repeat(1, 2)


def gate_layers(model: PreTrainedModel) -> list[nn.Linear]:
    return [layer.self_attn.g_proj for layer in model.model.layers]


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The gates of a forward pass, [batch, seq, heads] of each layer."""
    seen: list[torch.Tensor] = []
    scale = model.config.gate_scale
    hooks = [
        gate.register_forward_hook(lambda _, __, logits: seen.append(scale * torch.sigmoid(logits.float())))
        for gate in gate_layers(model)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def distance_from_one(model: PreTrainedModel) -> float:
    with recorded(model.eval()) as actual:
        model(batch(1000))
    assert len(actual) == len(gate_layers(model))
    return torch.stack(actual).sub(1).abs().mean().item()


def train(
    mode: str, *, checkpointed: bool = False, gate_init: float = 0.85, lr: float = 1e-3, steps: int = 50
) -> PreTrainedModel:
    """With gates at the same learning rate as all else."""
    model = new_model(mode, gate_init)
    assert distance_from_one(model) < 1e-6
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(gate_param_groups(model, lr=lr, gate_lr=lr))
    if mode == "bfloat16, float32 states":
        optimizer = keep_float32_states(optimizer)
    context = torch.autocast("cpu", torch.bfloat16) if mode == "bfloat16 autocast" else nullcontext()
    for step in range(steps):
        tokens = batch(step)
        optimizer.zero_grad()
        with context:
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    return model


def bias_change(model: PreTrainedModel) -> float:
    """Of the mean over heads and layers, from where each bias started."""
    start = gate_layers(new_model("float32", model.config.gate_init))
    pairs = zip(gate_layers(model), start, strict=True)
    return torch.stack([(gate.bias.float() - first.bias).abs().mean() for gate, first in pairs]).mean().item()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bfloat16"])
def test_gates_move_measurably_in_50_steps(mode: str, checkpointed: bool) -> None:
    model = train(mode, checkpointed=checkpointed)
    assert distance_from_one(model) > MOVED
    assert bias_change(model) > 0.005
    gate = gate_layers(model)[0]
    assert gate.weight.dtype == (torch.bfloat16 if mode == "bfloat16, float32 states" else torch.float32)
    assert model.lm_head.weight.dtype == (torch.bfloat16 if mode.startswith("bfloat16,") else torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_saturated_gates_do_not(mode: str) -> None:
    """The measure above tells them apart."""
    model = train(mode, gate_init=0.9999)
    assert distance_from_one(model) < 0.1 * MOVED


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("bfloat16") and "auto" not in mode])
def test_small_updates_of_biases_are_lost_in_bfloat16_alone(mode: str) -> None:
    change = bias_change(train(mode, lr=1e-4, steps=100))
    if mode == "bfloat16":
        assert change == 0
    else:
        assert change > 0.001


GATES = {
    "G1": {},
    "elementwise": {"gate_granularity": "elementwise"},
    "all positions": {"gate_position": ["G1", "G2", "G3", "G4", "G5"], "gate_granularity": "elementwise"},
    "input-independent": {"gate_position": ["G1", "G2", "G3", "G4"], "gate_input_independent": True},
    "tied": {"tie_word_embeddings": True},
}
FLOAT32_GATES = {"gate_dtype": "float32", "dtype": torch.bfloat16}


def is_gate_name(name: str) -> bool:
    return ".g_" in name


def model_of(name: str, dtype: torch.dtype) -> GatedLlamaForCausalLM:
    torch.manual_seed(0)
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES | GATES[name])).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_gate_name(key):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def assert_gates_alone_are_float32(model: nn.Module) -> None:
    names = {name for name, _ in model.named_parameters() if is_gate_name(name)}
    assert names
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in names else torch.bfloat16), name


@pytest.mark.parametrize("name", list(GATES))
def test_float32_gates_are_loaded_and_saved(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    whole = model_of(name, torch.float32)
    whole.save_pretrained(tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", **FLOAT32_GATES)
    assert_gates_alone_are_float32(model)
    assert not any(".g_" in key for key in model.config.to_dict())
    for key, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor if is_gate_name(key) else tensor.bfloat16()), key

    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["gate_dtype"] == "float32"
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": "auto"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", **options)
        assert_gates_alone_are_float32(again)
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = [each(tokens).logits.float() for each in (whole, model, plain)]
        gates_off = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", gate_position=[])(tokens).logits
    assert (logits[0] - logits[1]).abs().max() < 0.02
    assert (logits[1] - logits[2]).abs().max() < 0.02
    assert (logits[0] - gates_off).abs().max() > 0.04


@pytest.mark.parametrize("name", list(GATES))
def test_new_models_have_float32_gates(name: str, tokens: torch.Tensor) -> None:
    config = GatedLlamaConfig(**SIZES | GATES[name], gate_dtype="float32")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert_gates_alone_are_float32(model)
    assert model(tokens).logits.dtype == torch.bfloat16


def test_gates_have_the_model_s_dtype_by_default() -> None:
    assert GatedLlamaConfig().gate_dtype is None
    model = AutoModelForCausalLM.from_config(GatedLlamaConfig(**SIZES), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("value", ["bfloat16", "float64", 32])
def test_other_gate_dtypes_are_errors(value: Any, tmp_path: Path) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="gate_dtype") as caught:
        GatedLlamaConfig(gate_dtype=value)
    assert str(value) in str(caught.value)
    gated_model().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassFieldValidationError, match="gate_dtype") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, gate_dtype=value)
    assert str(value) in str(caught.value)


def test_float32_gates_without_the_package(tmp_path: Path) -> None:
    model_of("all positions", torch.float32).save_pretrained(tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", **FLOAT32_GATES)
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").gate_dtype == "float32"
    paths = [tmp_path / name for name in ("float32", "saved", "weights")]
    finished = run_isolated("load_gate_dtypes.py", *paths)
    assert finished.returncode == 0, finished.stderr
    for actual in torch.load(paths[-1]):
        assert actual.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name

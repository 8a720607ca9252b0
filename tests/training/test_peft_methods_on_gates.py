"""Every method of PEFT on gates that are still open: no NaN, and no gate that is counted as trained but never moves."""

import re
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    preprocess_loraga,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.configuration import OPEN_GATE_WEIGHT
from modeling_gated.peft_gate_probe import GateLayer, probe
from modeling_gated.training import gate_peft_config
from tests.helpers.gated_models import SIZES


TOKENS = torch.arange(1, 41)[None]
# Options that a method needs on layers as small as these.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100},
    "C3A": {"block_size": 2},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 2},
    "PSOFT": {"r": 2},
    "ROAD": {"group_size": 2},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 2},
    "WAVEFT": {"n_frequency": 20},
}
CANNOT_TRAIN_GATES = {
    **dict.fromkeys(("BOFT", "DELORA", "FROD", "HIRA", "HRA", "OFT"), "late or never"),
    **dict.fromkeys(("PEANUT", "PSOFT", "TINYLORA", "pissa", "pissa_niter_4"), "late or never"),
    "GLORA": "not a plain torch.nn.Linear",
}
# Methods that start at random, in a Llama, too, or add a penalty to the loss.
NOT_THE_SOURCE_AT_FIRST = {"kasa", "ADALORA", "C3A", "FOURIERFT", "UNILORA", "VBLORA"}
# Methods that put no adapter into linear layers.
ELSEWHERE = {
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"),
    *("SHADOW", "TRAINABLE_TOKENS", "XLORA"),
}
METHODS = sorted({method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING} - ELSEWHERE)
INITIALIZATIONS = ("pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", "mica", "eva")
LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "qalora": {"use_qalora": True},
    "kasa": {"kasa_config": lora.KasaConfig(), "r": 4},
    "velora": {"velora_config": lora.VeloraConfig()},
    "monteclora": {"monteclora_config": lora.MontecloraConfig()},
    "bdlora": {"use_bdlora": lora.BdLoraConfig(match_strict=False)},
    **{name: {"init_lora_weights": name, "r": 4} for name in INITIALIZATIONS},
}


def config_of(method: str, **fields: Any) -> PeftConfig:
    if method in LORA:
        return LoraConfig(task_type="CAUSAL_LM", **LORA[method] | fields)
    make = next(make for kind, make in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == method)
    return make(task_type="CAUSAL_LM", **OPTIONS.get(method, {}) | fields)


def models(**options: Any) -> tuple[GatedLlamaForCausalLM, LlamaForCausalLM]:
    """A gated model as conversion makes it, and its source."""
    source = LlamaConfig(**SIZES)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(source)
    gated = GatedLlamaForCausalLM(GatedLlamaConfig.from_source_config(source, **options))
    assert not gated.load_state_dict(llama.state_dict(), strict=False).unexpected_keys
    return gated, llama


def gate_layers(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("self_attn.g_proj")]


def keywords(method: str) -> dict[str, Any]:
    tasks = {"task_ids": torch.zeros(1, dtype=torch.long)} if method == "POLY" else {}
    return {"input_ids": TOKENS, "labels": TOKENS, **tasks}


@pytest.mark.parametrize("method", [*METHODS, *LORA])
def test_gates_that_peft_counts_as_trained_move(method: str) -> None:
    """With "all-linear", from the source's loss; what a method cannot move is left out, with one warning."""
    gated, llama = models()
    source_loss = llama(TOKENS, labels=TOKENS).loss.item()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(gated, config_of(method, target_modules="all-linear"))
    left_out = [str(warning.message) for warning in caught if "gates out of target_modules" in str(warning.message)]
    adapted = [gate for gate in gate_layers(model) if any(parameter.requires_grad for parameter in gate.parameters())]
    if method in CANNOT_TRAIN_GATES:
        assert len(left_out) == 1 and CANNOT_TRAIN_GATES[method] in left_out[0] and "\n" not in left_out[0]
        assert not adapted
    else:
        assert not left_out
        assert len(adapted) == SIZES["num_hidden_layers"]
    logits: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(adapted))}
    inputs = torch.randn(1, 40, SIZES["hidden_size"])

    def keep(gates: list[nn.Module]) -> None:
        for index, gate in enumerate(gates):
            extra = {"task_ids": torch.zeros(1, dtype=torch.long)} if method == "POLY" else {}
            logits[index].append(gate(inputs, **extra).detach().clone())

    model.eval()
    keep(adapted)
    model.train()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    for step in range(4):
        loss = model(**keywords(method)).loss
        assert torch.isfinite(loss)
        if step == 0 and method in NOT_THE_SOURCE_AT_FIRST:
            adapted_llama = get_peft_model(llama, config_of(method, target_modules="all-linear")).train()
            assert adapted_llama(**keywords(method)).loss.item() != source_loss
        elif step == 0:
            assert loss.item() == pytest.approx(source_loss, abs=2e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    keep(adapted)
    for before, after in logits.values():
        assert (after - before).abs().max() > 1e-7


def test_every_initialization_of_lora_is_known() -> None:
    """LoftQ asks for a GPU, for a Llama, too; CorDA and LoRA-GA need data, and have tests of their own."""
    names = re.findall(r"'([a-z]\w*)[_']", str(typing.get_type_hints(LoraConfig)["init_lora_weights"]))
    assert {name.removesuffix("_niter") for name in names} == {*INITIALIZATIONS, "corda", "loftq"} - {"pissa_niter_4"}


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize(("rows", "columns"), [(6, 48), (9, 576), (512, 512)])
def test_a_verdict_does_not_depend_on_rank_and_shape(rank: int, rows: int, columns: int) -> None:
    """Adam moves PiSSA's gates after some steps, the sooner the lower the rank."""
    name, gate = "model.layers.0.self_attn.g_proj", GateLayer(rows, columns, OPEN_GATE_WEIGHT, 1.0)
    for method, is_refused in [("pissa", True), ("LORA", False), ("dora", False)]:
        reason = probe(LoraModel, config_of(method, r=rank, lora_alpha=1, target_modules=[name]), name, gate)
        assert (reason is not None and "late or never" in reason) if is_refused else reason is None


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("weight", [OPEN_GATE_WEIGHT, 0.0])
def test_corda_is_tried_with_the_statistics_that_it_has(method: str, weight: float) -> None:
    gated, _ = models()
    for gate in gate_layers(gated):
        nn.init.constant_(gate.weight, weight)
    config = config_of("LORA", init_lora_weights="corda", r=2, target_modules=["q_proj", "g_proj"])
    config.corda_config = lora.CordaConfig(corda_method=method)
    preprocess_corda(gated, config, run_model=lambda: [gated(torch.randint(1, 90, (1, 40))) for _ in range(32)])
    with pytest.raises(ValueError, match=r"self_attn\.g_proj.*late or never"):
        get_peft_model(gated, config)
    assert hasattr(gate_layers(gated)[0], "eigens")  # for another try without gates


def test_lora_ga_trains_gates() -> None:
    gated, _ = models()
    config = config_of("LORA", init_lora_weights="lora_ga", r=2, target_modules=["g_proj"])
    config.lora_ga_config = LoraGAConfig()
    preprocess_loraga(gated, config, lambda: gated(TOKENS, labels=TOKENS).loss.backward())
    model = get_peft_model(gated, config)
    assert all(any(parameter.requires_grad for parameter in gate.parameters()) for gate in gate_layers(model))


def test_alora_trains_gates() -> None:
    """Its layers do nothing without its tokens, which a gate alone never sees."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(models()[0], config_of("LORA", alora_invocation_tokens=[5], target_modules="all-linear"))
    model.train()(**keywords("LORA")).loss.backward()
    moved = {
        name: parameter.grad.abs().max() for name, parameter in model.named_parameters() if "g_proj.lora_B" in name
    }
    assert len(moved) == SIZES["num_hidden_layers"] and all(moved.values())


def test_gates_without_a_bias_to_rescale() -> None:
    """Bias and weight are both nearly 0, so that IA3 and RoAd have nothing to rescale."""
    for method in ("IA3", "ROAD"):
        with pytest.raises(ValueError, match=f"g_proj' with {method}: .* late or never"):
            get_peft_model(models(gate_init=0.5)[0], config_of(method, target_modules=["q_proj", "g_proj"]))
        get_peft_model(models()[0], config_of(method, target_modules=["q_proj", "g_proj"]))


def test_a_gate_targeted_as_a_parameter() -> None:
    fields = {"target_modules": ["q_proj"], "target_parameters": ["self_attn.g_proj.weight"]}
    with pytest.raises(ValueError, match=r"^target_parameters must not include .*out of target_parameters"):
        get_peft_model(models()[0], config_of("pissa", **fields))
    model = get_peft_model(models()[0], config_of("LORA", **fields))
    assert all(any(parameter.requires_grad for parameter in gate.parameters()) for gate in gate_layers(model))


@pytest.mark.parametrize("target", [["q_proj", "g_proj"], r".*\.self_attn\..*_proj"], ids=["list", "expression"])
@pytest.mark.parametrize("method", ["OFT", "HIRA", "pissa"])
def test_named_gates_are_refused(method: str, target: Any) -> None:
    gated, _ = models()
    before = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        get_peft_model(gated, config_of(method, target_modules=target))
    message = str(caught.value)
    assert message.startswith("target_modules must not include 'model.layers.0.self_attn.g_proj' with ")
    assert "gate_peft_config(base, gates='full')" in message and "\n" not in message
    assert all(torch.equal(gated.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dora_on_weights_of_zero_is_no_nan(dtype: torch.dtype) -> None:
    """A float16 model, or a conversion by an earlier version."""
    gated, _ = models()
    for gate in gate_layers(gated):
        nn.init.zeros_(gate.weight)
    gated.to(dtype)
    with pytest.raises(ValueError, match=r"self_attn\.g_proj' with LORA \(use_dora=True\).*gives NaN"):
        get_peft_model(gated, LoraConfig(use_dora=True, target_modules=["g_proj"]))
    with pytest.warns(UserWarning, match="leaves 3 gates out of target_modules='all-linear'"):
        model = get_peft_model(gated, LoraConfig(use_dora=True, target_modules="all-linear"))
    assert model(TOKENS).logits.isfinite().all()


def test_a_second_adapter_and_an_injected_one_are_checked_too() -> None:
    gated, _ = models()
    model = get_peft_model(gated, config_of("OFT", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="target_modules must not include"):
        model.add_adapter("second", config_of("OFT", target_modules=["g_proj"]))
    with pytest.warns(UserWarning, match="leaves 3 gates out"):
        model.add_adapter("third", config_of("OFT", target_modules="all-linear"))
    with pytest.raises(ValueError, match="target_modules must not include"):
        inject_adapter_in_model(config_of("HRA", target_modules=["g_proj"]), models()[0])


def test_gates_that_have_been_trained_take_any_method() -> None:
    gated, _ = models()
    for gate in gate_layers(gated):
        nn.init.normal_(gate.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(gated, config_of("OFT", target_modules="all-linear", oft_block_size=16))
    assert all(any(parameter.requires_grad for parameter in gate.parameters()) for gate in gate_layers(model))


def test_gates_in_full_and_frozen_are_no_targets() -> None:
    for gates in ("full", "frozen"):
        base = config_of("OFT", target_modules="all-linear", oft_block_size=16)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(models()[0], gate_peft_config(base, gates))
    get_peft_model(models()[0], LoraConfig(use_dora=True, target_modules="all-linear", modules_to_save=["g_proj"]))


def test_a_trained_adapter_loads_for_inference(tmp_path: Path) -> None:
    """A method that could not train these gates is loaded, on weights of 0, too."""
    gated, _ = models()
    for gate in gate_layers(gated):
        nn.init.normal_(gate.weight)
    model = get_peft_model(gated, config_of("OFT", target_modules=["g_proj"], oft_block_size=16))
    model.save_pretrained(tmp_path)
    fresh, llama = models()
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(TOKENS).logits, llama(TOKENS).logits)


def test_a_probe_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    gated, _ = models()
    torch.manual_seed(5)
    with pytest.raises(ValueError):
        get_peft_model(gated, config_of("OFT", target_modules=["g_proj"]))
    assert torch.equal(torch.rand(3), expected)


def test_a_probe_does_not_seed_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, _ = models()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    with pytest.raises(ValueError):
        get_peft_model(gated, config_of("OFT", target_modules=["g_proj"]))


def test_a_probe_does_not_depend_on_defaults() -> None:
    config, name = config_of("LORA", target_modules=["g_proj"]), "model.layers.0.self_attn.g_proj"
    gate = GateLayer(6, 48, OPEN_GATE_WEIGHT, 1.0)
    with torch.device("meta"):
        assert probe(LoraModel, config, name, gate) is None
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert probe(LoraModel, config, name, gate) is None
    finally:
        torch.set_default_dtype(default)


def test_a_function_on_a_gate_is_not_called() -> None:
    """As accelerate's hooks set `forward`."""
    gated, _ = models()
    for gate in gate_layers(gated):
        gate.forward = lambda *_: pytest.fail("called")
    get_peft_model(gated, config_of("LORA", target_modules=["g_proj"]))


def test_weight_norm_of_an_open_gate_is_the_gate() -> None:
    gated, llama = models()
    for gate in gate_layers(gated):
        nn.utils.parametrizations.weight_norm(gate)
        assert gate.weight.max().item() == pytest.approx(OPEN_GATE_WEIGHT, rel=1e-5, abs=0)
    with torch.no_grad():
        assert torch.equal(gated(TOKENS).logits, llama(TOKENS).logits)


@pytest.mark.parametrize("second", ["dora", "pissa"])
def test_gates_in_full_get_no_second_adapter_that_cannot_train_them(second: str) -> None:
    """PEFT counts the layers in its wrapper of a gate in full as linear layers of their own."""
    gated, _ = models()
    for name, parameter in gated.named_parameters():
        if name.endswith("g_proj.weight"):
            nn.init.zeros_(parameter)
    adapted = get_peft_model(gated, gate_peft_config(LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.add_adapter("second", config_of(second, target_modules="all-linear"))
    adapted.set_adapter("second")
    assert torch.isfinite(adapted(TOKENS).logits).all()
    assert not [name for name, _ in adapted.named_parameters() if "g_proj" in name and ".second" in name]

"""Trainer with groups of parameters that suit gates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from modeling_gated.training import GateTrainerMixin, gate_peft_config
from tests.helpers.gated_models import SIZES, gated_model


class GateTrainer(GateTrainerMixin, Trainer):
    pass


class Recorder(TrainerCallback):
    """The learning rates that each step is taken with."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_step_begin(self, *_: Any, optimizer: torch.optim.Optimizer, **__: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def dataset() -> list[dict[str, list[int]]]:
    rows = torch.randint(1, SIZES["vocab_size"], (24, 8), generator=torch.Generator().manual_seed(3)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(path: Path, model: torch.nn.Module | None = None, **options: Any) -> GateTrainer:
    of_trainer = ("gate_learning_rate", "float32_states", "optimizers", "callbacks")
    mine = {name: options.pop(name) for name in of_trainer if name in options}
    arguments: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    model = gated_model(num_hidden_layers=2) if model is None else model
    return GateTrainer(model, TrainingArguments(path, **arguments | options), train_dataset=dataset(), **mine)


def group_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.fast
def test_groups_are_right_from_the_start(tmp_path: Path) -> None:
    gate_trainer = trainer(tmp_path, gate_learning_rate=1e-2, weight_decay=0.1)
    optimizer = gate_trainer.create_optimizer()
    assert optimizer is gate_trainer.optimizer
    values = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert values == [(1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.1), (1e-2, 0.0)]
    groups = group_names(gate_trainer.model, optimizer)
    gates = {name for name, _ in gate_trainer.model.named_parameters() if "g_proj" in name}
    assert groups[2] == {name for name in gates if name.endswith("weight")}
    assert groups[3] == {name for name in gates if name.endswith("bias")}
    reference = Trainer(gate_trainer.model, gate_trainer.args).create_optimizer()
    assert [names - gates for names in group_names(gate_trainer.model, reference)] == groups[:2]
    assert sum(map(len, groups)) == len(list(gate_trainer.model.parameters()))
    ours, theirs = ({**group, "params": None} for group in (optimizer.param_groups[0], reference.param_groups[0]))
    assert ours == theirs


def test_the_schedule_scales_both_alike(tmp_path: Path) -> None:
    recorder = Recorder()
    gate_trainer = trainer(tmp_path, gate_learning_rate=1e-2, warmup_steps=2, callbacks=[recorder])
    before = weights_of(gate_trainer.model)
    gate_trainer.train()
    factors = [0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]
    assert len(recorder.rates) == 6
    for factor, rates in zip(factors, recorder.rates, strict=True):
        assert rates == pytest.approx([1e-3 * factor, 1e-3 * factor, 1e-2 * factor, 1e-2 * factor])
    after = gate_trainer.model.state_dict()
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items() if "embed" not in name)


def test_gates_get_the_arguments_learning_rate_by_default(tmp_path: Path) -> None:
    assert {group["lr"] for group in trainer(tmp_path).create_optimizer().param_groups} == {1e-3}


def test_an_optimizer_that_is_passed_in_is_left_alone(tmp_path: Path) -> None:
    model = gated_model(num_hidden_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gate_trainer = trainer(tmp_path, model, optimizers=(optimizer, None), gate_learning_rate=1e-2, float32_states=True)
    assert gate_trainer.create_optimizer() is optimizer
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5
    assert len(group["params"]) == len(list(model.parameters()))
    assert not optimizer._optimizer_step_pre_hooks


def test_an_ungated_model_has_no_gate_learning_rate(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path, model, gate_learning_rate=1e-2).train()
    assert "no gate to train" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_ungated_model_is_trained_as_ever(tmp_path: Path) -> None:
    trained = []
    for trainer_class in (GateTrainer, Trainer):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        arguments = TrainingArguments(tmp_path, max_steps=3, save_strategy="no", report_to=[], use_cpu=True)
        trainer_class(model, arguments, train_dataset=dataset()).train()
        trained.append(model.state_dict())
    for name, tensor in trained[0].items():
        assert torch.equal(tensor, trained[1][name]), name


def test_float32_states_are_kept(tmp_path: Path) -> None:
    model = gated_model(num_hidden_layers=2).bfloat16()
    gate_trainer = trainer(tmp_path, model, float32_states=True, learning_rate=1e-4, gate_learning_rate=1e-5)
    before = weights_of(model)
    gate_trainer.train()
    bias = model.model.layers[0].self_attn.g_proj.bias
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        state = gate_trainer.optimizer.state[parameter]
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "master_weight")} == {torch.float32}
        assert torch.equal(state["master_weight"].bfloat16(), parameter)
    start = before["model.layers.0.self_attn.g_proj.bias"].float()
    moved = (gate_trainer.optimizer.state[bias]["master_weight"] - start).abs()
    assert 1e-5 < moved.max() < 1e-4


def test_no_float32_states_by_default(tmp_path: Path) -> None:
    model = gated_model(num_hidden_layers=2).bfloat16()
    gate_trainer = trainer(tmp_path, model, max_steps=1)
    gate_trainer.train()
    assert {state["exp_avg"].dtype for state in gate_trainer.optimizer.state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("float32_states", [False, True])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(float32_states: bool, tmp_path: Path) -> None:
    def run(path: Path, **options: Any) -> tuple[GateTrainer, dict[str, torch.Tensor]]:
        model = gated_model(num_hidden_layers=2)
        if float32_states:
            model.bfloat16()
        options |= {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-4, "weight_decay": 0.1}
        gate_trainer = trainer(path, model, gate_learning_rate=1e-3, float32_states=float32_states, **options)
        return gate_trainer, weights_of(model)

    whole, start = run(tmp_path)
    whole.train()
    resumed, _ = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, expected), actual in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(actual, expected), name
        for key, value in whole.optimizer.state[expected].items():
            assert torch.equal(resumed.optimizer.state[actual][key], value), (name, key)
    assert not torch.equal(start["lm_head.weight"], whole.model.lm_head.weight)
    assert (tmp_path / "checkpoint-6").is_dir()


@pytest.mark.parametrize("float32_states", [False, True])
@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch"])
def test_other_optimizers(optim: str, float32_states: bool, tmp_path: Path) -> None:
    model = gated_model(num_hidden_layers=2)
    if float32_states:
        model.bfloat16()
    before = weights_of(model)
    gate_trainer = trainer(
        tmp_path, model, optim=optim, gate_learning_rate=0.1, float32_states=float32_states, max_steps=3
    )
    gate_trainer.train()
    assert [group["initial_lr"] for group in gate_trainer.optimizer.param_groups] == [1e-3, 1e-3, 0.1, 0.1]
    name = "model.layers.0.self_attn.g_proj.weight"
    parameter = model.get_parameter(name)
    state = gate_trainer.optimizer.state[parameter]
    assert parameter.dtype == (torch.bfloat16 if float32_states else torch.float32)
    assert ("master_weight" in state) == float32_states
    trained = state["master_weight"] if float32_states else parameter  # SGD's three steps may be too small for bfloat16
    assert not torch.equal(trained, before[name].float())


@pytest.mark.parametrize("lora", [False, True])
def test_a_peft_model(lora: bool, tmp_path: Path) -> None:
    base = LoraConfig(task_type="CAUSAL_LM") if lora else None
    model = get_peft_model(gated_model(num_hidden_layers=2), gate_peft_config(base))
    before = weights_of(model)
    gate_trainer = trainer(tmp_path, model, gate_learning_rate=1e-2, learning_rate=1e-3, weight_decay=0.1)
    gate_trainer.train()
    values = [(group["initial_lr"], group["weight_decay"]) for group in gate_trainer.optimizer.param_groups]
    assert values == [(1e-3, 0.1)] * lora + [(1e-2, 0.1), (1e-2, 0.0)]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name

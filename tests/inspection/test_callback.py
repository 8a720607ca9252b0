"""The meters while a model is trained."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.inspection import InspectionCallback, InspectionError
from modeling_gated.inspection.callback import initial_gate, measure
from modeling_gated.training import gate_peft_config
from tests.helpers.gated_models import SIZES, gated_model
from tests.helpers.inspected_models import eager_attention, inputs_of, inspected_model


NAMES = {"first_token_attention", "massive_activation", "gate_mean", "gate_drift"}


class Listener(TrainerCallback):
    """Stands for what `report_to` names: it is told of every log."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.heard.append((state.global_step, logs))


def trainer_of(path: Path, model: torch.nn.Module, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    rows = torch.randint(1, SIZES["vocab_size"], (24, 8), generator=torch.Generator().manual_seed(3)).tolist()
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    flags: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2, "use_cpu": True, "logging_strategy": "no"}
    flags |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    flags |= {name: options.pop(name) for name in ("logging_strategy", "logging_steps") if name in options}
    if kind is SFTTrainer:
        from datasets import Dataset

        from tests.helpers.byte_tokenizer import byte_tokenizer

        arguments = SFTConfig(str(path), **flags | {"bf16": False})
        return SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(dataset), processing_class=byte_tokenizer(), **options
        )
    return Trainer(model, TrainingArguments(str(path), **flags), train_dataset=dataset, **options)


def new_model(**options: Any) -> GatedLlamaForCausalLM:
    torch.manual_seed(0)
    return GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES | options))


@pytest.mark.parametrize("wrapped", ["plain", "peft"])
def test_meters_are_logged_every_so_many_steps(wrapped: str, tmp_path: Path) -> None:
    model: Any = new_model(gate_scale=1.25)
    if wrapped == "peft":
        model = get_peft_model(model, gate_peft_config(LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    listener = Listener()
    trainer = trainer_of(tmp_path, model, callbacks=[listener])
    ids = inputs_of("plain")["input_ids"]
    trainer.add_callback(InspectionCallback(trainer, ids, every=2))
    trainer.train()
    logged = [(step, logs) for step, logs in listener.heard if "gate_mean" in logs]
    assert [step for step, _ in logged] == [0, 2, 4, 6]
    assert all(set(logs) >= NAMES for _, logs in logged)
    drifts = [logs["gate_drift"] for _, logs in logged]
    assert drifts[0] == pytest.approx(0, abs=1e-6)
    assert drifts == sorted(drifts)
    assert drifts[-1] > 1e-3
    assert logged[0][1]["gate_mean"] == pytest.approx(0.85 * 1.25, abs=2e-3)
    assert [entry["step"] for entry in trainer.state.log_history if "gate_mean" in entry] == [0, 2, 4, 6]
    assert logged[-1][1] == pytest.approx({"epoch": 2.0} | measure(model, ids), rel=1e-5)


def test_the_trainers_own_logs_are_not_lost(tmp_path: Path) -> None:
    """Of steps at which both are written, too."""
    trainer = trainer_of(tmp_path, new_model(), logging_strategy="steps", logging_steps=2)
    trainer.add_callback(InspectionCallback(trainer, inputs_of("plain")["input_ids"], every=2))
    trainer.train()
    for name in ("loss", "gate_mean"):
        assert [entry["step"] for entry in trainer.state.log_history if name in entry][-3:] == [2, 4, 6]


def test_training_is_what_it_would_be_without(tmp_path: Path) -> None:
    """Dropout and its random numbers, train mode and weights."""
    weights = []
    for measured in (False, True):
        model = new_model(attention_dropout=0.2)
        trainer = trainer_of(tmp_path, model)
        if measured:
            trainer.add_callback(InspectionCallback(trainer, inputs_of("plain")["input_ids"], every=1))
        trainer.train()
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_it_works_with_trl(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, new_model(vocab_size=258), SFTTrainer)
    trainer.add_callback(InspectionCallback(trainer, inputs_of("plain")["input_ids"], every=3))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "gate_drift" in entry] == [0, 3, 6]


def test_what_is_measured_is_the_mean(tmp_path: Path) -> None:
    """Without gates there is no word of them; padding counts nowhere, and modes of modules come back."""
    model, inputs = inspected_model("llama, grouped queries"), inputs_of("padded right")
    model.train()
    model.model.layers[1].eval()
    measurements = measure(model, inputs["input_ids"], inputs["attention_mask"])
    assert set(measurements) == {"first_token_attention", "massive_activation"}
    assert model.training
    assert not model.model.layers[1].training
    model.eval()
    attention = [
        torch.cat([torch.tensor(layer[0][:, 1:31, 0]), torch.tensor(layer[1][:, 1:, 0])], dim=1).mean()
        for layer in eager_attention(model, inputs)
    ]
    assert measurements["first_token_attention"] == pytest.approx(sum(attention).item() / 3, abs=1e-5)


def test_what_cannot_be_measured_does_not_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    model.config.n_layer = 5  # so that its layers are not found
    trainer = trainer_of(tmp_path, model)
    trainer.add_callback(InspectionCallback(trainer, inputs_of("plain")["input_ids"], every=6))
    trainer.add_callback(InspectionCallback(trainer, torch.full((1, 9), 1000), every=6))  # beyond the vocabulary
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        trainer.train()
    assert "not measured: GPT2Model: no list of num_hidden_layers=5 layers found" in caplog.text
    assert trainer.state.global_step == 6
    with pytest.raises(InspectionError, match="Linear: there is no model of Transformers' in it"):
        measure(torch.nn.Linear(2, 2), torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0.85),
        ({"gate_init": 0.5, "gate_scale": 2.0}, 1.0),
        ({"gate_bias": False}, 0.5),
        ({"gate_activation": "ns_sigmoid"}, 0.85),
        ({"gate_form": "additive", "gate_activation": "silu"}, 0.0),
    ],
)
def test_the_gate_of_a_new_model(fields: dict[str, Any], expected: float) -> None:
    assert initial_gate(GatedLlamaConfig(**SIZES | fields)) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"input_ids": torch.ones(3)}, r"input_ids must be \[batch, tokens\] with at least 2 tokens, got \[3\]"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"input_ids": torch.ones(1, 4, dtype=torch.long)} | options
    with pytest.raises(InspectionError, match=message):
        InspectionCallback(trainer_of(tmp_path, gated_model()), **arguments)

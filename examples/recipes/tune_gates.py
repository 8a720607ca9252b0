"""
Train only the gates with Trainer and PEFT: 0.12 % of SmolLM2-135M's parameters, an adapter of 0.6 MB.

    python examples/recipes/tune_gates.py [--steps 40] [--text 'FILES/*.txt'] [--output build/tune_gates]

The baseline is the ungated model with LoRA on `o_proj`, whose inputs the gates multiply. Its rank gives the closest
number of trainable parameters. Both models see the same batches. Each seed's adapter is in OUTPUT/gated-seedN/adapter.
An interrupted run resumes when started again. Needs pip install '.[peft,plot]'.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_gated.training import GateTrainerMixin, gate_peft_config


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.shared.packed_text import PackedText
from examples.shared.recipe import (
    Models,
    RecipeSettings,
    held_out,
    one_clear_line,
    open_output,
    packed_text,
    prepare,
    read_flags,
    setting,
)
from examples.shared.trainer_recipe import arguments, one_process, run_all, tune


@dataclass
class Settings(RecipeSettings):
    output: str = setting("build/tune_gates", "folder for all results")
    learning_rate: float = setting(1e-2, "learning rate of the baseline's LoRA")


class GateTrainer(GateTrainerMixin, Trainer):
    """Trainer with parameter groups for gates."""


class WindowDataset(Dataset):
    """The first windows of a text in the order of a seed."""

    def __init__(self, text: PackedText, length: int, count: int, seed: int) -> None:
        self.windows = text.training_batch(length, 0, count, seed)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def load(models: Models, kind: str) -> PeftModel:
    """Load the gated model with trainable gates, or the baseline with LoRA."""
    if kind == "gated":
        model = AutoModelForCausalLM.from_pretrained(models.gated)
        return get_peft_model(model, gate_peft_config())
    model = AutoModelForCausalLM.from_pretrained(models.control)
    rank = equal_rank(AutoConfig.from_pretrained(models.gated))
    return get_peft_model(model, LoraConfig(r=rank, target_modules=["o_proj"], task_type="CAUSAL_LM"))


def equal_rank(config: PreTrainedConfig) -> int:
    """Return the rank at which LoRA on `o_proj` has about as many parameters as headwise gates."""
    gates = config.num_attention_heads * (config.hidden_size + 1)
    return max(1, round(gates / (config.num_attention_heads * config.head_dim + config.hidden_size)))


def main(flags: Sequence[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, flags)
    with one_clear_line():
        one_process()
        open_output(settings)
        models = prepare(settings)
        text = packed_text(settings, models.control)

    def run(kind: str, seed: int, folder: Path) -> None:
        set_seed(seed)
        trainer = GateTrainer(
            load(models, kind),
            TrainingArguments(**arguments(settings, folder, seed)),
            train_dataset=WindowDataset(text, settings.length, settings.steps * settings.batch_size, seed),
            gate_learning_rate=settings.gate_learning_rate if kind == "gated" else None,
        )
        tune(trainer, held_out(settings, text), folder)

    run_all(settings, run)


if __name__ == "__main__":
    main()

r"""
Continue pretraining of all weights, gates included, with accelerate. The baseline is the ungated model.

    python examples/recipes/continue_pretraining.py [--steps 40] [--text 'FILES/*.txt'] [--output FOLDER]

    # several processes: only the configuration differs
    accelerate launch --config_file examples/shared/accelerate_fsdp2.yaml \
        examples/recipes/continue_pretraining.py [--model CHECKPOINT]
    accelerate launch --config_file examples/shared/accelerate_deepspeed_zero3.yaml \
        examples/recipes/continue_pretraining.py

Both models see the same batches; each seed has its order of windows. Weights, gradients and AdamW states are float32.
Computation is bfloat16 unless --mixed_precision no. The results are the checkpoints OUTPUT/gated-seedN and
OUTPUT/control-seedN. An interrupted run resumes from the last saved state when started again. Needs
pip install '.[plot]'.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed

from modeling_gated.training import gate_param_groups
from modeling_gated.training.loop import Run, Stage, make_accelerator, read_losses, train


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.shared.accelerate_training import WindowLoss, checkpoint_layers, load, save_model
from examples.shared.comparison import report
from examples.shared.recipe import (
    KINDS,
    RESULT,
    RecipeSettings,
    held_out,
    measure,
    one_clear_line,
    open_output,
    packed_text,
    prepare,
    read_flags,
    setting,
    write_result,
)


@dataclass
class Settings(RecipeSettings):
    output: str = setting("build/continue_pretraining", "folder for all results")
    learning_rate: float = setting(1e-4, "learning rate of all parameters but the gates")
    gate_learning_rate: float = setting(1e-3, "learning rate of the gates")
    weight_decay: float = setting(0.1, "weight decay of all weights but norms and biases")
    gradient_accumulation_steps: int = setting(1, "batches per optimizer step")
    mixed_precision: str = setting("bf16", "precision of computation: bf16, or no for float32")
    gradient_checkpointing: bool = setting(False, "recompute layers in the backward pass to save memory")

    def check(self) -> None:
        super().check()
        if self.mixed_precision not in ("bf16", "no"):
            raise ValueError(f"--mixed_precision must be bf16 or no, got {self.mixed_precision}")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                f"--gradient_accumulation_steps must be at least 1, got {self.gradient_accumulation_steps}"
            )
        if not self.weight_decay >= 0:
            raise ValueError(f"--weight_decay must be at least 0, got {self.weight_decay}")


def train_model(run: Run, settings: Settings, start: Path, name: str, is_gated: bool) -> None:
    """Continue the training of a checkpoint, and save the result as OUTPUT/name."""
    model = load(start)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    gate_lr = settings.gate_learning_rate if is_gated else None
    groups = gate_param_groups(model, settings.learning_rate, gate_lr, settings.weight_decay)
    module = train(run, WindowLoss(model), groups, Stage(name, settings))
    save_model(run, module, name)
    run.accelerator.free_memory(module)


def measure_models(run: Run, settings: Settings, start: Path, name: str) -> None:
    """Write OUTPUT/name/result.json with the measurements before and after training."""
    evaluation = held_out(settings, run.text)
    before = measure(load(start).to(run.accelerator.device), evaluation)
    model = load(run.output / name).to(run.accelerator.device)
    result = {"before": before, "after": measure(model, evaluation), "losses": read_losses(run.output, name)}
    write_result(run.output / name, result | {"trainable_parameters": model.num_parameters(only_trainable=True)})


def main(flags: Sequence[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, flags)
    output = Path(settings.output)
    with one_clear_line():
        accelerator = make_accelerator(settings.mixed_precision, settings.gradient_accumulation_steps)
        with accelerator.main_process_first():
            open_output(settings, processes=accelerator.num_processes)
            models = prepare(settings)
            text = packed_text(settings, models.control)
    for seed in settings.seeds:
        set_seed(seed)
        accumulation = settings.gradient_accumulation_steps
        run = Run(
            output, accelerator, text, models.control, settings.warmup_steps, accumulation, settings.save_every, seed
        )
        for kind in KINDS:
            name = f"{kind}-seed{seed}"
            if not (output / name).is_dir():
                train_model(run, settings, models[kind], name, kind == "gated")
            if accelerator.is_main_process and not (output / name / RESULT).is_file():
                measure_models(run, settings, models[kind], name)
            accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(output, settings.seeds)
    accelerator.end_training()


if __name__ == "__main__":
    main()

r"""
All weights are trained on, gates among them, with accelerate; the control is the ungated model.

    python examples/recipes/continue_pretraining.py [--steps 40] [--text 'FILES/*.txt'] [--output FOLDER]

    # several processes: by configuration alone
    accelerate launch --config_file examples/shared/accelerate_fsdp2.yaml \
        examples/recipes/continue_pretraining.py [--model CHECKPOINT]
    accelerate launch --config_file examples/shared/accelerate_deepspeed_zero3.yaml \
        examples/recipes/continue_pretraining.py

Both models see the same batches: each seed's order of the text's windows. Weights, their gradients and AdamW's states
are float32, computation is bfloat16 unless --mixed_precision no. Each training ends with a checkpoint,
OUTPUT/gated-seedN and OUTPUT/control-seedN. Started again, it goes on where it was: from the last state that was saved.
Needs pip install '.[plot]'.
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
    output: str = setting("build/continue_pretraining", "folder for all that is made")
    learning_rate: float = setting(1e-4, "of all but the gates")
    gate_learning_rate: float = setting(1e-3, "of the gates")
    weight_decay: float = setting(0.1, "of all weights but norms and biases")
    gradient_accumulation_steps: int = setting(1, "batches per step of the optimizer")
    mixed_precision: str = setting("bf16", "bf16 or no")
    gradient_checkpointing: bool = setting(False, "whether layers are computed again for the backward pass")

    def check(self) -> None:
        super().check()
        if self.mixed_precision not in ("bf16", "no"):
            raise ValueError(f"--mixed_precision={self.mixed_precision} is neither bf16 nor no")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"--gradient_accumulation_steps={self.gradient_accumulation_steps} is not positive")
        if not self.weight_decay >= 0:
            raise ValueError(f"--weight_decay={self.weight_decay} is negative")


def train_model(run: Run, settings: Settings, start: Path, name: str, is_gated: bool) -> None:
    """Train a checkpoint on, and save it as OUTPUT/name."""
    model = load(start)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    gate_lr = settings.gate_learning_rate if is_gated else None
    groups = gate_param_groups(model, settings.learning_rate, gate_lr, settings.weight_decay)
    module = train(run, WindowLoss(model), groups, Stage(name, settings))
    save_model(run, module, name)
    run.accelerator.free_memory(module)


def measure_models(run: Run, settings: Settings, start: Path, name: str) -> None:
    """Write OUTPUT/name/result.json: what the checkpoint does before and after."""
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

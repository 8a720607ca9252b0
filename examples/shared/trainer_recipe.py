"""What the recipes with Trainer, or TRL's trainers, share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from examples.shared.comparison import report
from examples.shared.recipe import KINDS, RESULT, HeldOut, RecipeSettings, measure, write_result


def arguments(settings: RecipeSettings, folder: Path, seed: int) -> dict[str, Any]:
    """What Trainer is told, so that it saves states, and logs every step's loss."""
    return {
        "output_dir": str(folder / "state"),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup_steps,
        "logging_steps": 1,
        "save_steps": settings.save_every,
        "save_total_limit": 2,  # the last may be incomplete
        "seed": seed,
        "report_to": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


class LossBesideProgress(ProgressCallback):
    """Trainer's progress bar with the loss at its end, and not on a line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


def run_all(settings: RecipeSettings, run: Callable[[str, int, Path], None]) -> None:
    """Each seed of both models that is not finished, each in a folder of its own; then the comparison."""
    for seed in settings.seeds:
        for kind in KINDS:
            folder = Path(settings.output) / f"{kind}-seed{seed}"
            if not (folder / RESULT).is_file():
                run(kind, seed, folder)
    report(Path(settings.output), settings.seeds)


def tune(trainer: Trainer, evaluation: list[HeldOut], folder: Path) -> None:
    """Train from the last complete state, if there is one; write FOLDER/adapter and what the model did and does."""
    model = trainer.model
    before = measure(model.get_base_model(), evaluation)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBesideProgress)
    state = last_state(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if state is None else str(state))
    model.save_pretrained(folder / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"before": before, "after": measure(model.get_base_model(), evaluation), "losses": losses}
    write_result(folder, result | {"trainable_parameters": model.num_parameters(only_trainable=True)})


def last_state(folder: Path) -> Path | None:
    """The last of Trainer's checkpoints that is complete; a later one was being written when a run was killed."""
    states = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for state in reversed(states):
        try:
            json.loads((state / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # written after all else
            return state
        except (OSError, ValueError):
            shutil.rmtree(state)
    return None


def one_process() -> None:
    """
    Raises:
        ValueError: if there are more processes, or more GPUs, over which Trainer would spread larger batches.
    """
    if (processes := PartialState().num_processes) > 1:
        raise ValueError(f"this recipe is for one process, not {processes}")
    if (gpus := torch.cuda.device_count()) > 1:
        raise ValueError(f"this recipe is for one device, not {gpus} GPUs: set CUDA_VISIBLE_DEVICES to one")

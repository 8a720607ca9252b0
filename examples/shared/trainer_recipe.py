"""Shared code of recipes that use Trainer or TRL's trainers."""

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
    """Return arguments of Trainer: it saves states and logs the loss of every step."""
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
    """Progress bar of Trainer that shows the loss in the bar instead of a line per step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


def run_all(settings: RecipeSettings, run: Callable[[str, int, Path], None]) -> None:
    """Run each unfinished seed of both models in its own folder, then write the comparison."""
    for seed in settings.seeds:
        for kind in KINDS:
            folder = Path(settings.output) / f"{kind}-seed{seed}"
            if not (folder / RESULT).is_file():
                run(kind, seed, folder)
    report(Path(settings.output), settings.seeds)


def tune(trainer: Trainer, evaluation: list[HeldOut], folder: Path) -> None:
    """Train from the last complete state, if any; write FOLDER/adapter and the measurements before and after."""
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
    """Return the last complete checkpoint of Trainer. Delete incomplete checkpoints of killed runs."""
    states = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for state in reversed(states):
        try:
            json.loads((state / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the last file that is written
            return state
        except (OSError, ValueError):
            shutil.rmtree(state)
    return None


def one_process() -> None:
    """
    Check that Trainer runs in a single process on a single device, so that the batch size is as set.

    Raises:
        ValueError: if there are more processes or GPUs.
    """
    if (processes := PartialState().num_processes) > 1:
        raise ValueError(f"this recipe must run in 1 process, got {processes}; start it without accelerate launch")
    if (gpus := torch.cuda.device_count()) > 1:
        raise ValueError(f"this recipe must run on 1 GPU, got {gpus}; set CUDA_VISIBLE_DEVICES to one GPU")

"""What the recipes with Trainer, or TRL's trainers, share."""

from pathlib import Path
from typing import Any

import torch
from recipe import RecipeSettings
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import get_last_checkpoint


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
        "save_total_limit": 1,
        "seed": seed,
        "report_to": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


class LossBesideProgress(ProgressCallback):
    """Trainer's progress bar with the loss at its end, and not on a line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


def train(trainer: Trainer) -> list[float]:
    """Train from the last saved state, if there is one. Returns the loss of each step."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBesideProgress)
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

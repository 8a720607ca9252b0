"""
Distil a gated model from a teacher, by default the model without gates, on attention outputs and predictions.

    python examples/recipes/distill.py [--steps 40] [--gate_scale 1.0] [--student CHECKPOINT [--teacher CHECKPOINT]]

The loss is the relative squared error of each layer's attention outputs, plus the KL divergence of predictions. The
default student is the converted SmolLM2-135M-Instruct with gate_scale 1, so that all gates are 0.85. Only its gates are
trained, to recover the teacher's outputs. Base weights are frozen. Teacher and student share the base weights, so both
together take the memory of a single model. If your student's base weights differ from the source's, give the source as
--teacher. The results are in OUTPUT/distilled-seedN. An interrupted run resumes when started again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel, set_seed

from modeling_gated.training import Distillation, gate_param_groups, ungated
from modeling_gated.training.loop import Run, Stage, make_accelerator, read_losses, train


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.shared.accelerate_training import load, save_model
from examples.shared.comparison import spread
from examples.shared.recipe import (
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
    output: str = setting("build/distill", "folder for all results")
    student: str = setting("", "folder of a gated checkpoint (default: --model, converted)")
    teacher: str = setting("", "folder of a checkpoint of the same sizes (default: the student without gates)")
    gate_scale: float = setting(
        0.0, "gate_scale of the student (default: 1 for the converted model, otherwise unchanged)"
    )
    dtype: str = setting("bfloat16", "dtype of all weights but the gates, which are float32: bfloat16 or float32")
    trained: str = setting(
        "gates",
        "trained weights: gates, or attention for gates and q, k, v and o_proj, which the teacher then does not share",
    )
    attention_weight: float = setting(1.0, "weight of the relative squared error of attention outputs")
    kl_weight: float = setting(1.0, "weight of the KL divergence of predictions")
    learning_rate: float = setting(1e-4, "learning rate of q, k, v and o_proj")

    def check(self) -> None:
        super().check()
        for name in ("student", "teacher"):
            path = getattr(self, name)
            if path and not (Path(path) / "config.json").is_file():
                raise ValueError(f"--{name} must be the folder of a checkpoint, got {path} without config.json")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"--dtype must be bfloat16 or float32, got {self.dtype}")
        if self.trained not in ("gates", "attention"):
            raise ValueError(f"--trained must be gates or attention, got {self.trained}")
        for name in ("gate_scale", "attention_weight", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}")
        if self.student and self.model:
            raise ValueError(
                f"--student and --model must not both be given, got {self.student} and {self.model}; remove one of them"
            )
        if self.student and (kind := AutoConfig.from_pretrained(self.student).model_type) != "gated_llama":
            raise ValueError(
                f"--student must be a gated checkpoint, got {self.student} with model_type={kind!r}; convert it first"
            )


class WindowDistillation(Distillation):
    """Distillation on windows. The last token of a window is not an input. Forward returns only the loss."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        loss = super().forward(windows[:, :-1]).loss
        assert loss is not None
        return loss


def load_student(settings: Settings, path: Path) -> PreTrainedModel:
    """Load the student, and freeze all weights that are not trained."""
    scale = settings.gate_scale or (0.0 if settings.student else 1.0)
    options = {"gate_scale": scale} if scale else {}
    model = load(path, settings.dtype, gate_dtype="float32", **options)
    trained = ("g_proj",) if settings.trained == "gates" else ("g_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in trained)
    return model


def load_teacher(settings: Settings, start: Path) -> PreTrainedModel:
    """Load the teacher. Weights that it shares with the student are not trained."""
    return load(settings.teacher, settings.dtype) if settings.teacher else ungated(load_student(settings, start))


def distillation(
    settings: Settings, student: PreTrainedModel, teacher: PreTrainedModel, share_weights: bool = True
) -> WindowDistillation:
    """Return the loss module of student and teacher."""
    weights = {"attention_weight": settings.attention_weight, "kl_weight": settings.kl_weight}
    return WindowDistillation(student, teacher, share_weights=share_weights, **weights)


def size(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters, with shared parameters counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def evaluate(settings: Settings, run: Run, path: Path) -> dict[str, float]:
    """Measure a student and its teacher on held-out text."""
    evaluation = held_out(settings, run.text)
    teacher = load_teacher(settings, run.tokenizer)
    both = distillation(settings, load_student(settings, path), teacher).to(run.accelerator.device).eval()
    measured = measure(both.student, evaluation)
    losses = [
        Distillation.forward(both, sequence.tokens[None, :-1].to(run.accelerator.device)) for sequence in evaluation
    ]
    for name in ("kl_loss", "attention_loss"):
        if name in losses[0]:
            measured[name] = torch.stack([loss[name] for loss in losses]).mean().item()
    return measured | {"teacher's loss": measure(both.teacher, evaluation)["loss"]}


def distil(settings: Settings, run: Run) -> None:
    """Train the student of a seed, and write OUTPUT/distilled-seedN with its measurements."""
    start, name = run.tokenizer, f"distilled-seed{run.seed}"
    if not (run.output / name).is_dir():
        student = load_student(settings, start)
        sharded = is_sharded(run.accelerator)
        # The default teacher shares the student's tensors, so no tensor is loaded twice.
        teacher = load_teacher(settings, start) if settings.teacher else ungated(student, share_weights=not sharded)
        module = distillation(settings, student, teacher, share_weights=not sharded)
        ratio = size(module) / size(student)
        run.accelerator.print(f"teacher and student: {size(module) / 1e6:,.0f} MB, {ratio:.2f} x the student's weights")
        groups = gate_param_groups(student, settings.learning_rate, settings.gate_learning_rate)
        prepared = train(run, module, groups, Stage(name, settings), float32_states=settings.dtype != "float32")
        save_model(run, prepared, name, "student")
        run.accelerator.free_memory(prepared)
    if run.accelerator.is_main_process and not (run.output / name / RESULT).is_file():
        before, after = evaluate(settings, run, start), evaluate(settings, run, run.output / name)
        write_result(run.output / name, {"before": before, "after": after, "losses": read_losses(run.output, name)})
    run.accelerator.wait_for_everyone()


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether accelerate shards weights over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def report(output: Path, seeds: list[int]) -> None:
    """Print the table of all seeds, and plot their losses in OUTPUT/distillation.png."""
    results = [json.loads((output / f"distilled-seed{seed}" / RESULT).read_text(encoding="utf-8")) for seed in seeds]
    table = Table(box=box.MARKDOWN)
    table.add_column(f"held-out text, mean (min to max) of {len(seeds)} seeds")
    for moment in ("before", "after"):
        table.add_column(moment, justify="right")
    for name in results[0]["before"]:
        table.add_row(name, *(spread([result[moment][name] for result in results]) for moment in ("before", "after")))
    Console(width=120, highlight=False).print(table)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for seed, result in zip(seeds, results, strict=True):
        axes.plot(range(1, len(result["losses"]) + 1), result["losses"], label=f"seed {seed}")
    axes.set(xlabel="step", ylabel="attention outputs' error + KL divergence", yscale="log")
    axes.legend()
    figure.savefig(output / "distillation.png", dpi=150)


def main(flags: Sequence[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, flags)
    output = Path(settings.output)
    with one_clear_line():
        accelerator = make_accelerator("no", 1)
        with accelerator.main_process_first():
            if is_sharded(accelerator) and settings.dtype != "float32":
                raise ValueError(f"--dtype must be float32 for sharded weights, as gates are, got {settings.dtype}")
            open_output(settings, processes=accelerator.num_processes)
            start = Path(settings.student) if settings.student else prepare(settings).gated
            text = packed_text(settings, start)
            distillation(
                settings, load_student(settings, start), load_teacher(settings, start)
            )  # check now, before training
    for seed in settings.seeds:
        set_seed(seed)
        run = Run(output, accelerator, text, start, settings.warmup_steps, 1, settings.save_every, seed)
        distil(settings, run)
    if accelerator.is_main_process:
        report(output, settings.seeds)
    accelerator.end_training()


if __name__ == "__main__":
    main()

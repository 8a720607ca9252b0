"""Shared code of the training recipes: settings, starting checkpoints, and measurements."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from examples.shared.packed_text import PackedText, files, write_tokens
from examples.shared.smollm2 import write_checkpoint
from modeling_gated.conversion import ConversionError, convert_checkpoint
from modeling_gated.evaluation import EvaluationError
from modeling_gated.evaluation.windows import mean_loss
from modeling_gated.inspection import FirstTokenAttention, GateDrift, GateScores, inspecting
from modeling_gated.training.loop import check_run_settings


KINDS = ("gated", "control")
RESULT = "result.json"
DEFAULT_MODEL = Path("build/demo/SmolLM2-135M-Instruct")
AnySettings = TypeVar("AnySettings", bound="RecipeSettings")


def setting(default: Any, explanation: str) -> Any:
    """Return a dataclass field that becomes a flag."""
    return field(default=default, metadata={"help": explanation})


@dataclass
class RecipeSettings:
    """Flags of all recipes."""

    output: str = setting("", "folder for all results; a run resumes from results in the folder")
    model: str = setting("", "folder of an ungated checkpoint (default: SmolLM2-135M-Instruct)")
    text: list[str] = field(
        default_factory=list, metadata={"help": "globs of UTF-8 files (default: Python's language reference)"}
    )
    steps: int = setting(40, "optimizer steps")
    length: int = setting(256, "length of a training sequence in tokens")
    batch_size: int = setting(2, "sequences per process and forward pass")
    learning_rate: float = setting(1e-4, "learning rate of all parameters but the gates")
    gate_learning_rate: float = setting(1e-2, "learning rate of the gates")
    warmup_steps: int = setting(4, "steps with rising learning rates, which then fall along a cosine")
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "seeds; both models are trained once per seed"}
    )
    save_every: int = setting(20, "steps between two saved states")
    evaluation_windows: int = setting(8, "number of held-out sequences")

    def check(self) -> None:
        """
        Check the settings.

        Raises:
            ValueError: if a setting has a wrong value.
        """
        for name in ("steps", "length", "batch_size", "save_every", "evaluation_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gate_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be positive and finite, got {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ValueError(f"--warmup_steps must be at least 0, got {self.warmup_steps}")
        if len(set(self.seeds)) < max(1, len(self.seeds)):
            raise ValueError(f"--seeds must be at least one seed, each once, got {self.seeds}")
        if self.model and not (Path(self.model) / "config.json").is_file():
            raise ValueError(f"--model must be the folder of a checkpoint, got {self.model} without config.json")
        if self.text and not files(self.text):
            raise ValueError(f"--text must match a file, got {self.text}; quote globs in the shell")


@dataclass(frozen=True)
class Models:
    """Starting checkpoints, with and without gates, which compute the same function."""

    control: Path
    gated: Path

    def __getitem__(self, kind: str) -> Path:
        return {"gated": self.gated, "control": self.control}[kind]


@contextmanager
def one_clear_line() -> Iterator[None]:
    """End the program with one line for errors that the user can act on."""
    try:
        yield
    except (OSError, ValueError, ConversionError, EvaluationError) as error:
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)


def read_flags(kind: type[AnySettings], description: str, arguments: Sequence[str] | None) -> AnySettings:
    """Return the settings from command-line flags, checked."""
    disable_progress_bar()  # loading bars would mix with training bars
    (settings,) = HfArgumentParser(kind, description=description).parse_args_into_dataclasses(arguments)
    with one_clear_line():
        settings.check()
    return settings


def open_output(settings: RecipeSettings, **identity: Any) -> None:
    """Create the output folder, or check that it has the same settings. A later run may add seeds."""
    compared = {name: value for name, value in asdict(settings).items() if name not in ("output", "seeds")}
    check_run_settings(compared | identity, Path(settings.output))


def prepare(settings: RecipeSettings) -> Models:
    """Return the source and its gated conversion, which is written to the output folder once."""
    source, start = Path(settings.model or DEFAULT_MODEL), Path(settings.output) / "start"
    if not settings.model:
        write_checkpoint(source)
    if not start.is_dir():
        partial = start.with_suffix(".partial")
        convert_checkpoint(source, partial, overwrite=True)
        # Set gate_dtype in the checkpoint, because loading an adapter's base model reads only the checkpoint.
        config = AutoConfig.from_pretrained(partial)
        config.gate_dtype = "float32"
        config.save_pretrained(partial)
        partial.rename(start)
    return Models(source, start)


def packed_text(settings: RecipeSettings, tokenizer: Path) -> PackedText:
    """
    Return the text's tokens, which are written to the output folder once.

    Raises:
        ValueError: if the text is too short.
    """
    path = Path(settings.output) / "tokens.bin"
    if not path.is_file():
        write_tokens(settings.text, AutoTokenizer.from_pretrained(tokenizer), path)
    text = PackedText(path)
    if text.training_windows(settings.length) < 1 or text.held_out_size <= settings.length:
        raise ValueError(
            f"--length must fit the text's {text.training_size:,} training tokens and {text.held_out_size:,} held-out "
            f"tokens, got {settings.length}; use a longer text"
        )
    return text


@dataclass(frozen=True)
class HeldOut:
    """Held-out token ids [tokens], of which the first `given` are not predicted."""

    tokens: torch.Tensor
    given: int = 1


def held_out(settings: RecipeSettings, text: PackedText) -> list[HeldOut]:
    """Return held-out windows of the text."""
    return [HeldOut(window) for window in text.held_out_windows(settings.length, settings.evaluation_windows)]


@torch.no_grad()
def measure(model: PreTrainedModel, sequences: Sequence[HeldOut]) -> dict[str, float]:
    """
    Measure a model, with or without PEFT modules, on held-out sequences in evaluation mode.

    Args:
        model: model, whose mode is restored afterwards.
        sequences: held-out sequences.

    Returns:
        `loss` in nats per token, and `first_token_attention`, the attention to token 0. The attention is a mean over
        sequences, heads, layers and all queries but the first. For a gated model also `gate`, the mean gate, and
        `gate_drift`, the mean of |gate - 1|.
    """
    was_training = model.training
    model.eval()
    first_token, gates, drift = FirstTokenAttention(), GateScores(), GateDrift(initial=1.0)
    windows = [sequence.tokens.to(model.device) for sequence in sequences]
    with inspecting(model, first_token, gates, drift):
        loss = mean_loss(model, windows, prompts=[sequence.given for sequence in sequences])
    model.train(was_training)
    measurements = {"loss": loss, "first_token_attention": first_token.result().mean().item()}
    if statistics := gates.result().get("G1"):
        measurements |= {"gate": statistics.value.mean().item(), "gate_drift": drift.result()}
    return measurements


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write FOLDER/result.json in one step."""
    partial = folder / "result.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / RESULT)

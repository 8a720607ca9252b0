"""What the training recipes share: their settings, what they start from, and what they measure of a model."""

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
    """A field that is a flag."""
    return field(default=default, metadata={"help": explanation})


@dataclass
class RecipeSettings:
    """The flags that all recipes have."""

    output: str = setting("", "folder for all that is made; where there is a part of it, that is gone on from")
    model: str = setting("", "folder of an ungated checkpoint; by default the real SmolLM2-135M-Instruct")
    text: list[str] = field(
        default_factory=list, metadata={"help": "globs of UTF-8 files; by default Python's language reference"}
    )
    steps: int = setting(40, "steps of the optimizer")
    length: int = setting(256, "tokens of a training sequence")
    batch_size: int = setting(2, "sequences per process and forward pass")
    learning_rate: float = setting(1e-4, "of all but the gates")
    gate_learning_rate: float = setting(1e-2, "of the gates")
    warmup_steps: int = setting(4, "over which learning rates rise; then they fall along a cosine")
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "one training of both models each"})
    save_every: int = setting(20, "steps between two states to go on from")
    evaluation_windows: int = setting(8, "held-out sequences")

    def check(self) -> None:
        for name in ("steps", "length", "batch_size", "save_every", "evaluation_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} is not positive")
        for name in ("learning_rate", "gate_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name}={getattr(self, name)} is not positive")
        if self.warmup_steps < 0:
            raise ValueError(f"--warmup_steps={self.warmup_steps} is negative")
        if len(set(self.seeds)) < max(1, len(self.seeds)):
            raise ValueError(f"--seeds={self.seeds}: each once, and at least one")
        if self.model and not (Path(self.model) / "config.json").is_file():
            raise ValueError(f"--model={self.model}: there is no config.json")
        if self.text and not files(self.text):
            raise ValueError(f"--text={self.text}: matches no file")


@dataclass(frozen=True)
class Models:
    """Where both start: the same function, with gates and without."""

    control: Path
    gated: Path

    def __getitem__(self, kind: str) -> Path:
        return {"gated": self.gated, "control": self.control}[kind]


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Ends the program with one line for what the user can mend."""
    try:
        yield
    except (OSError, ValueError, ConversionError, EvaluationError) as error:
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)


def read_flags(kind: type[AnySettings], description: str, arguments: Sequence[str] | None) -> AnySettings:
    disable_progress_bar()  # of loading, beside those of training
    (settings,) = HfArgumentParser(kind, description=description).parse_args_into_dataclasses(arguments)
    with one_clear_line():
        settings.check()
    return settings


def open_output(settings: RecipeSettings, **identity: Any) -> None:
    """Make the output's folder, or see that it was made with the same settings; more seeds may be added to it."""
    compared = {name: value for name, value in asdict(settings).items() if name not in ("output", "seeds")}
    check_run_settings(compared | identity, Path(settings.output))


def prepare(settings: RecipeSettings) -> Models:
    """The source and its gated conversion, in the output's folder; made once."""
    source, start = Path(settings.model or DEFAULT_MODEL), Path(settings.output) / "start"
    if not settings.model:
        write_checkpoint(source)
    if not start.is_dir():
        partial = start.with_suffix(".partial")
        convert_checkpoint(source, partial, overwrite=True)
        # Of the checkpoint, not of a model that is loaded from it: what loads an adapter's base sees this alone.
        config = AutoConfig.from_pretrained(partial)
        config.gate_dtype = "float32"
        config.save_pretrained(partial)
        partial.rename(start)
    return Models(source, start)


def packed_text(settings: RecipeSettings, tokenizer: Path) -> PackedText:
    """The text's tokens, in a file of the output's folder; made once."""
    path = Path(settings.output) / "tokens.bin"
    if not path.is_file():
        write_tokens(settings.text, AutoTokenizer.from_pretrained(tokenizer), path)
    text = PackedText(path)
    if text.training_windows(settings.length) < 1 or text.held_out_size <= settings.length:
        raise ValueError(
            f"--length={settings.length}: the text has {text.training_size:,} tokens to train on, and "
            f"{text.held_out_size:,} are held out"
        )
    return text


@dataclass(frozen=True)
class HeldOut:
    """Tokens [seq], and how many of the first are not to be predicted."""

    tokens: torch.Tensor
    given: int = 1


def held_out(settings: RecipeSettings, text: PackedText) -> list[HeldOut]:
    return [HeldOut(window) for window in text.held_out_windows(settings.length, settings.evaluation_windows)]


@torch.no_grad()
def measure(model: PreTrainedModel, sequences: Sequence[HeldOut]) -> dict[str, float]:
    """
    What a model, with PEFT's modules in it or not, does on held-out sequences. In evaluation mode meanwhile.

    Returns:
        `loss`, nats per token; `first_token_attention`, the probability of token 0, mean over all sequences' queries
        but the first, heads and layers; of a gated model `gate`, its mean value, and `gate_drift`, the mean of
        |gate - 1|.
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
    partial = folder / "result.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / RESULT)

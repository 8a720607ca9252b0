"""The subcommand that evaluates long contexts."""

import json
import math
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .output import one_clear_line


if TYPE_CHECKING:
    import torch

    from modeling_gated.evaluation import ContextEvaluation


_JSON, _PLOT = "context.json", "context.png"
_FORMAT = 1


def evaluate_context(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT",
            help="Directories with safetensors, or models on the hub: gated ones, or any that generate with a cache of "
            "keys and values.",
        ),
    ],
    lengths: Annotated[str, typer.Option(help="Lengths in tokens, separated by commas.")] = "1024,2048,4096,8192",
    tasks: Annotated[
        str, typer.Option(help="What to measure, separated by commas.")
    ] = "loss,passkey,multi_key_needle,variable_tracking",
    text: Annotated[
        Path | None, typer.Option(help="A text file, UTF-8.", show_default="Python's language reference")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of the text, as long as the longest length, for the loss.")] = 1,
    samples: Annotated[int, typer.Option(help="Prompts per task and length.")] = 10,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask in the tokenizer's chat template, or in plain text.",
            show_default="as the tokenizer has one",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is hidden in the text, and where.")] = 0,
    chunk_size: Annotated[int, typer.Option(help="Tokens per forward pass; memory grows with it.")] = 512,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="auto: the checkpoint's own.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:0 or cpu.", show_default="cuda if there is one")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help=f"A directory for {_JSON} and {_PLOT}.", show_default="none")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=f"Replace {_JSON} and {_PLOT} if they exist.")] = False,
) -> None:
    """
    Measure how well models use long inputs: loss by position, and tasks that hide something in a text.

    passkey: a number that is said once; multi_key_needle: the number of one word of four; variable_tracking: five
    variables with one value, through a chain of assignments. Scores are shares of the answers that were found.
    Lengths beyond a model's max_position_embeddings are marked with *.
    """
    with one_clear_line():
        from modeling_gated.conversion.sources import find_source
        from modeling_gated.evaluation import EvaluationError
        from modeling_gated.evaluation.context import check_settings, read_text
        from modeling_gated.evaluation.plot import check_plots, plot_context

        if not (lengths.strip() and all(word.strip().isdecimal() for word in lengths.split(","))):
            raise EvaluationError(f"--lengths {lengths}: not numbers of tokens, separated by commas")
        settings: dict[str, Any] = {
            "lengths": [int(word) for word in lengths.split(",")],
            "tasks": [word.strip() for word in tasks.split(",")],
            "windows": windows,
            "samples": samples,
            "chunk_size": chunk_size,
        }
        check_settings(**settings)
        read_text(text)
        if output is not None:
            check_plots()
            _check_output(output, overwrite)
        sources = [find_source(given).path for given in checkpoints]
        if files := [path for path in sources if not path.is_dir()]:
            raise EvaluationError(f"{files[0]}: not a directory with a checkpoint in safetensors")
        target = _device(device)
        found: list[ContextEvaluation] = []
        for path, name in zip(sources, _names(checkpoints), strict=True):
            found.append(
                _evaluate(path, dtype, target, name=name, text=text, chat=chat, seed=seed, progress=True, **settings)
            )
            if output is not None:  # at once, as the next one may fail after hours
                _write(found, output)
        _print_table(found)
        if output is not None:
            plot_context(found, output / _PLOT)
            typer.echo(f"written: {output / _JSON}, {output / _PLOT}")


def _check_output(output: Path, overwrite: bool) -> None:
    from modeling_gated.evaluation import EvaluationError

    existing = [name for name in (_JSON, _PLOT) if (output / name).exists()]
    if existing and not overwrite:
        raise EvaluationError(f"{output / existing[0]}: already exists; --overwrite replaces it")
    nearest = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise EvaluationError(f"{output}: cannot be made, as {nearest} is not a directory to write to")


def _device(given: str | None) -> "torch.device":
    import torch

    from modeling_gated.evaluation import EvaluationError

    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there
        raise EvaluationError(f"--device {given}: {str(error).splitlines()[0]}") from None
    return device


def _names(checkpoints: list[str]) -> list[str]:
    """The last part of each path or hub id; the whole of it where that is not enough."""
    last = [Path(given).name for given in checkpoints]
    return [name if last.count(name) == 1 else given for given, name in zip(checkpoints, last, strict=True)]


def _evaluate(path: Path, dtype: str, device: "torch.device", **options: Any) -> "ContextEvaluation":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_gated.registration  # noqa: F401 - makes the Auto classes know gated_llama
    from modeling_gated.conversion.architecture import naming
    from modeling_gated.evaluation import EvaluationError, evaluate_context

    with naming(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded
    if info["missing_keys"]:
        raise EvaluationError(f"{path}: has no {min(info['missing_keys'])}")
    return evaluate_context(model.eval().to(device), tokenizer, **options)


def _write(found: list["ContextEvaluation"], output: Path) -> None:
    from modeling_gated.conversion.manifest import replace_file

    packages = {name: version(name) for name in ("modeling-gated", "torch", "transformers")}
    evaluations = [asdict(evaluation) for evaluation in found]
    content = {"format": _FORMAT, "versions": packages, "evaluations": evaluations}
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / _JSON, (json.dumps(content, indent=2) + "\n").encode())


def _print_table(found: list["ContextEvaluation"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("up to tokens")
    table.add_column("model", overflow="fold")
    for length in found[0].lengths:
        table.add_column(f"{length:,}", justify="right")
    for evaluation in found:
        if evaluation.losses:
            marks = ["*" if part.end in evaluation.beyond else " " for part in evaluation.losses]
            numbers = [math.nan if part.loss is None else part.loss for part in evaluation.losses]
            values = [f"{loss:.3f}{mark}" for loss, mark in zip(numbers, marks, strict=True)]
            table.add_row("loss", evaluation.name, *values)
    for task in dict.fromkeys(score.task for score in found[0].scores):
        for evaluation in found:
            scores = [score for score in evaluation.scores if score.task == task]
            marks = ["*" if score.length in evaluation.beyond else " " for score in scores]
            values = [f"{score.score:.2f}{mark}" for score, mark in zip(scores, marks, strict=True)]
            table.add_row(task, evaluation.name, *values)
    Console(soft_wrap=True).print(table)
    if any(evaluation.beyond for evaluation in found):
        typer.echo("* more than max_position_embeddings")
    if len({evaluation.chat_template for evaluation in found}) > 1:
        typer.echo("note: some were asked in their chat template, others in plain text (--chat, --no-chat)", err=True)
    if len({(evaluation.text_tokens, evaluation.text_characters) for evaluation in found}) > 1:
        typer.echo("note: the tokenizers take the text for different tokens, so losses do not compare", err=True)

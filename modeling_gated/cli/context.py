"""The subcommand that evaluates models on long contexts."""

import json
import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modeling_gated.defaults import CHUNK_SIZE, CONTEXT_SAMPLES, CONTEXT_TASKS, CONTEXT_WINDOWS, SEED

from .models import find_device, find_models, load_model, names_of
from .options import COMPUTE, REPORT, Device, Dtype, TextFile
from .output import check_report_files, one_clear_line


if TYPE_CHECKING:
    from modeling_gated.evaluation import ContextEvaluation


_JSON, _PLOT = "context.json", "context.png"
_FORMAT = 1


def evaluate_context(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT",
            help="Directories with safetensors, GGUF files or models on the hub. Gated models, or any model that "
            "generates with a KV cache.",
        ),
    ],
    lengths: Annotated[
        str, typer.Option(metavar="N,N", help="Input lengths in tokens, separated by commas.")
    ] = "1024,2048,4096,8192",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK,TASK", help="Tasks to run, separated by commas.", show_default=", ".join(CONTEXT_TASKS)
        ),
    ] = ",".join(CONTEXT_TASKS),
    text: TextFile = None,
    windows: Annotated[
        int, typer.Option(metavar="N", help="Windows of text for the loss, each as long as the longest length.")
    ] = CONTEXT_WINDOWS,
    samples: Annotated[int, typer.Option(metavar="N", help="Prompts per task and length.")] = CONTEXT_SAMPLES,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask in the tokenizer's chat template, or in plain text.",
            show_default="chat if the tokenizer has a template",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Random seed for the hidden sentences and their places.")
    ] = SEED,
    chunk_size: Annotated[
        int,
        typer.Option(
            metavar="N", help="Tokens per forward pass. Memory grows with this number.", rich_help_panel=COMPUTE
        ),
    ] = CHUNK_SIZE,
    dtype: Dtype = "auto",
    device: Device = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help=f"Directory for {_JSON} and {_PLOT}.",
            show_default="none",
            rich_help_panel=REPORT,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help=f"Replace {_JSON} and {_PLOT} if they exist.", rich_help_panel=REPORT),
    ] = False,
) -> None:
    """
    Measure how well models use long inputs, side by side.

    Example: gated-llama evaluate-context build/gated --lengths 1024,4096

    Tasks, of which all but loss are in the style of RULER:

    loss: mean loss by position on a long text, in nats per token.
    passkey: recall a number hidden in the text.
    multi_key_needle: recall the number of one word among four.
    variable_tracking: follow a chain of assignments, name the five variables
    that share one value.

    A score is the share of expected answers in the output, from 0 to 1.
    An asterisk marks lengths beyond a model's max_position_embeddings.
    """
    with one_clear_line(output and output / _JSON, "results measured so far are in {}"):
        from modeling_gated.evaluation import EvaluationError, evaluate_context
        from modeling_gated.evaluation.context import check_settings
        from modeling_gated.evaluation.plot import check_plots, plot_context
        from modeling_gated.evaluation.text import read_text

        if not (lengths.strip() and all(word.strip().isdecimal() for word in lengths.split(","))):
            raise EvaluationError(
                f"--lengths must be numbers of tokens separated by commas, got {lengths}; for example 1024,4096"
            )
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
            check_report_files(output, (_JSON, _PLOT), overwrite)
        paths, target = find_models(checkpoints), find_device(device)
        evaluations: list[ContextEvaluation] = []
        for path, name in zip(paths, names_of(checkpoints), strict=True):
            model, tokenizer = load_model(path, dtype, target)
            options: dict[str, Any] = settings | {"name": name, "text": text, "chat": chat, "seed": seed}
            evaluations.append(evaluate_context(model, tokenizer, **options, progress=True))
            del model  # free memory before the next model is loaded
            if output is not None:  # save now: the next model may fail after hours
                _write(evaluations, output)
        _print_table(evaluations)
        if output is not None:
            plot_context(evaluations, output / _PLOT)
            typer.echo(f"written: {output / _JSON}, {output / _PLOT}")


def _write(evaluations: list["ContextEvaluation"], output: Path) -> None:
    from modeling_gated.checkpoints.replacement import replace_file

    packages = {name: version(name) for name in ("modeling-gated", "torch", "transformers")}
    contents = [asdict(evaluation) for evaluation in evaluations]
    content = {"format": _FORMAT, "versions": packages, "evaluations": contents}
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / _JSON, (json.dumps(content, indent=2) + "\n").encode())


def _print_table(evaluations: list["ContextEvaluation"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("up to tokens")
    table.add_column("model", overflow="fold")
    for length in evaluations[0].lengths:
        table.add_column(f"{length:,}", justify="right")
    for evaluation in evaluations:
        if evaluation.losses:
            marks = ["*" if position_loss.end in evaluation.beyond else " " for position_loss in evaluation.losses]
            numbers = [
                math.nan if position_loss.loss is None else position_loss.loss for position_loss in evaluation.losses
            ]
            values = [f"{loss:.3f}{mark}" for loss, mark in zip(numbers, marks, strict=True)]
            table.add_row("loss", evaluation.name, *values)
    for task in dict.fromkeys(score.task for score in evaluations[0].scores):
        for evaluation in evaluations:
            scores = [score for score in evaluation.scores if score.task == task]
            marks = ["*" if score.length in evaluation.beyond else " " for score in scores]
            values = [f"{score.score:.2f}{mark}" for score, mark in zip(scores, marks, strict=True)]
            table.add_row(task, evaluation.name, *values)
    Console(soft_wrap=True).print(table)
    if any(evaluation.beyond for evaluation in evaluations):
        typer.echo("* longer than max_position_embeddings")
    if len({evaluation.chat_template for evaluation in evaluations}) > 1:
        typer.echo(
            "note: prompts of some models use a chat template, prompts of others plain text; set --chat or --no-chat",
            err=True,
        )
    if len({(evaluation.text_tokens, evaluation.text_characters) for evaluation in evaluations}) > 1:
        typer.echo("note: the tokenizers split the text differently, so losses cannot be compared", err=True)

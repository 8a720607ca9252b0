"""The gated-llama command. Subcommands import torch and Transformers on their own, so that help is fast."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from .absorb import absorb
from .checkpoints import convert, extend, refresh_code, repair_tokenizer, ungate, verify
from .context import evaluate_context
from .inspect import inspect


app = typer.Typer(
    help="Add attention output gates (arXiv 2505.06708) to Llama-family checkpoints.",
    epilog="Help for one command: gated-llama convert --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Convert and check": (convert, verify, ungate, extend),
    "Remove attention sinks": (absorb,),
    "Measure": (inspect, evaluate_context),
    "Repair older checkpoints": (refresh_code, repair_tokenizer),
}
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modeling-gated {version('modeling-gated')}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


__all__ = ["app"]

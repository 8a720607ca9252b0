"""The gated-llama command. Torch and Transformers are imported by the subcommands that need them."""

from importlib.metadata import version
from typing import Annotated

import typer

from .absorb import absorb
from .checkpoints import convert, extend, refresh_code, repair_tokenizer, ungate, verify
from .context import evaluate_context
from .inspect import inspect


app = typer.Typer(
    help="Attention output gates (arXiv 2505.06708) for Llama-family checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (convert, verify, extend, ungate, refresh_code, repair_tokenizer, absorb, inspect, evaluate_context):
    app.command()(command)


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

"""What every subcommand says, and how it ends."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer


@contextmanager
def one_clear_line() -> Iterator[None]:
    """End with one line where the user can mend something, and where the user ends it."""
    try:
        yield
    except (ImportError, ValueError) as error:
        # ImportError: of a Transformers that is too old, for one. By name, as importing the errors takes seconds.
        if isinstance(error, ValueError) and type(error).__name__ not in ("ConversionError", "EvaluationError"):
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("error: interrupted; nothing was left behind", err=True)
        raise typer.Exit(130) from None


def print_lines(lines: Mapping[str, object]) -> None:
    """Labels and values, aligned."""
    from modeling_gated.conversion.errors import printable

    for label, value in lines.items():
        typer.echo(f"{label:18}{printable(value)}")

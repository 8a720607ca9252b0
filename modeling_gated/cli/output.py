"""What every subcommand says, and how it ends."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer


_MENDABLE = ("ConversionError", "EvaluationError", "InspectionError", "AbsorptionError")


@contextmanager
def one_clear_line(kept: Path | None = None, kept_as: str = "goes on from {}") -> Iterator[None]:
    """End with one line where the user can mend something, and where the user ends it; what is `kept` then, and how."""
    try:
        yield
    except (ImportError, ValueError) as error:
        # ImportError: of a Transformers that is too old, for one. By name, as importing the errors takes seconds.
        names = {base.__name__ for base in type(error).__mro__}
        if isinstance(error, ValueError) and names.isdisjoint(_MENDABLE):
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        left = kept_as.format(kept) if kept and kept.exists() else "nothing was left behind"
        typer.echo(f"error: interrupted; {left}", err=True)
        raise typer.Exit(130) from None


def print_lines(lines: Mapping[str, object]) -> None:
    """Labels and values, aligned."""
    from modeling_gated.conversion.errors import printable

    for label, value in lines.items():
        typer.echo(f"{label:18}{printable(value)}")


def check_output(folder: Path, files: Sequence[str], overwrite: bool, folders: Sequence[str] = ()) -> None:
    """Check, before anything takes long, that files and folders of these names can be written into a folder."""
    from modeling_gated.evaluation import EvaluationError

    existing = [folder / name for name in (*files, *folders) if (folder / name).exists()]
    if existing and not overwrite:
        raise EvaluationError(f"{existing[0]}: already exists; --overwrite replaces it")
    if others := [path for path in existing if path.is_dir() != (path.name in folders)]:
        raise EvaluationError(f"{others[0]}: cannot be replaced, as it is {'a' if others[0].is_dir() else 'no'} folder")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise EvaluationError(f"{folder}: cannot be made, as {nearest} is not a directory to write to")

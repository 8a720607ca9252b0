"""What every subcommand says, and how it ends."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from modeling_gated.errors import EvaluationError, ModelingGatedError, printable


# Arguments of the library with which its errors begin, as flags here.
_ARGUMENTS = re.compile(r"(dtype|gate_init|place|revision|tokens)=('[^']*'|[^\s:,]+)")
# Arguments that its errors advise.
_ADVISED = {"overwrite=True": "--overwrite", "replace_scaling=True": "--replace-scaling", "chat=False": "--no-chat"}


@contextmanager
def one_clear_line(kept: Path | None = None, kept_as: str = "goes on from {}") -> Iterator[None]:
    """End with one line where the user can mend something, and where the user ends it; what is `kept` then, and how."""
    try:
        yield
    except (ImportError, ModelingGatedError) as error:  # ImportError: a Transformers that is too old, for example
        typer.echo(f"error: {_with_flags(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        left = kept_as.format(kept) if kept and kept.exists() else "nothing was left behind"
        typer.echo(f"error: interrupted; {left}", err=True)
        raise typer.Exit(130) from None


def _with_flags(message: str) -> str:
    """Return a library's error with flags for its arguments: `place='link': ...` as `--place link: ...`."""
    if match := _ARGUMENTS.match(message):
        name, value = match.groups()
        message = f"--{name.replace('_', '-')} {value.strip(chr(39))}{message[match.end() :]}"
    for argument, flag in _ADVISED.items():
        message = message.replace(argument, flag)
    return message


def print_lines(lines: Mapping[str, object]) -> None:
    """Labels and values, aligned."""
    for label, value in lines.items():
        typer.echo(f"{label:18}{printable(value)}")


def check_report_files(folder: Path, files: Sequence[str], overwrite: bool, folders: Sequence[str] = ()) -> None:
    """Check, before anything takes long, that files and folders of these names can be written into a folder."""
    existing = [folder / name for name in (*files, *folders) if (folder / name).exists()]
    if existing and not overwrite:
        raise EvaluationError(f"{existing[0]}: already exists; --overwrite replaces it")
    if wrong_kind := [path for path in existing if path.is_dir() != (path.name in folders)]:
        raise EvaluationError(
            f"{wrong_kind[0]}: cannot be replaced, as it is {'a' if wrong_kind[0].is_dir() else 'no'} folder"
        )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise EvaluationError(f"{folder}: cannot be made, as {nearest} is not a directory to write to")

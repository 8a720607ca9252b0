"""Output and error handling that all subcommands share."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from modeling_gated.errors import EvaluationError, ModelingGatedError, printable


# Library errors begin with an argument's value, `place='link': ...`, or with a requirement, `seed must be ...`.
_ARGUMENTS = re.compile(r"(dtype|gate_init|place|revision|tokens)=('[^']*'|[^\s:,]+)")
_REQUIREMENTS = re.compile(
    r"(chunk_size|distill_tokens|dtype|gate_init|interventions|lengths|place|revision|sample_tokens|samples|seed|tasks|"
    r"tokens|window_tokens|windows) must be "
)
# Library errors advise these arguments.
_ADVISED = {"overwrite=True": "--overwrite", "replace_scaling=True": "--replace-scaling", "chat=False": "--no-chat"}


@contextmanager
def one_clear_line(
    kept: Path | None = None, kept_as: str = "run the command again to resume from {}"
) -> Iterator[None]:
    """
    End the command with one line on stderr for errors that the user can act on, and for an interrupt.

    Args:
        kept: path of intermediate results, named after an interrupt if it exists.
        kept_as: text that says what the path is for, with `{}` for the path.

    Raises:
        typer.Exit: with exit code 1 for an error, or 130 for an interrupt.
    """
    try:
        yield
    except (ImportError, ModelingGatedError) as error:  # ImportError: for example, Transformers is too old
        typer.echo(f"error: {_with_flags(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        left = kept_as.format(kept) if kept and kept.exists() else "nothing was left behind"
        typer.echo(f"error: interrupted; {left}", err=True)
        raise typer.Exit(130) from None


def _with_flags(message: str) -> str:
    """Return a library error with flags instead of arguments: `place='link': ...` becomes `--place link: ...`."""
    if match := _ARGUMENTS.match(message):
        name, value = match.groups()
        message = f"--{name.replace('_', '-')} {value.strip(chr(39))}{message[match.end() :]}"
    elif match := _REQUIREMENTS.match(message):
        name = "length" if match[1] == "window_tokens" else match[1]
        message = f"--{name.replace('_', '-')}{message[match.end(1) :]}"
    for argument, flag in _ADVISED.items():
        message = message.replace(argument, flag)
    return message


def print_lines(lines: Mapping[str, object]) -> None:
    """Print labels and values in two aligned columns."""
    for label, value in lines.items():
        typer.echo(f"{label:18}{printable(value)}")


def check_report_files(folder: Path, files: Sequence[str], overwrite: bool, folders: Sequence[str] = ()) -> None:
    """
    Check, before a long computation, that a command can write its report.

    Args:
        folder: directory of the report, which may not exist yet.
        files: names of files to write into the directory.
        overwrite: replace existing files and folders.
        folders: names of subdirectories to write.

    Raises:
        EvaluationError: if a name exists without `overwrite`, or as another kind of file, or the directory cannot be
            written to.
    """
    existing = [folder / name for name in (*files, *folders) if (folder / name).exists()]
    if existing and not overwrite:
        raise EvaluationError(f"{existing[0]}: already exists; --overwrite replaces it")
    for path in (path for path in existing if path.is_dir() != (path.name in folders)):
        raise EvaluationError(
            f"{path}: must be a {'file' if path.is_dir() else 'folder'} to be replaced; choose another directory"
        )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise EvaluationError(
            f"{folder}: cannot be created, because {nearest} is not a writable directory; choose another directory"
        )

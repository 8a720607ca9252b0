"""The subcommand that removes attention sinks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modeling_gated.defaults import DISTILL_TOKENS, SAMPLE_TOKENS, SEED

from .models import find_device
from .options import COMPUTE, Device, Output, Overwrite, Revision, Source
from .output import one_clear_line, print_lines


if TYPE_CHECKING:
    from modeling_gated.absorption import Absorption


def absorb(
    checkpoint: Source,
    output: Output,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text file to distil on. Repeat the option for several files, each a kind of text.",
            show_default="a novel, Python's reference and standard library",
        ),
    ] = None,
    distill_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to distil on.")] = DISTILL_TOKENS,
    sample_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", help="Tokens that SOURCE samples as additional text: half chats, half unprompted text."
        ),
    ] = SAMPLE_TOKENS,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed for text windows and sampling.")] = SEED,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Dtype to compute in: bfloat16 or float32. OUTPUT keeps SOURCE's dtype.",
            show_default="on a CPU float32, with bfloat16 matmuls if the CPU has instructions for them; otherwise "
            "bfloat16 if SOURCE is bfloat16, or float32",
            rich_help_panel=COMPUTE,
        ),
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """
    Remove attention sinks and massive activations from a checkpoint.

    Example: gated-llama absorb HuggingFaceTB/SmolLM2-135M-Instruct build/absorbed

    Gates replace the function of the sinks. OUTPUT is then distilled from
    SOURCE. OUTPUT's predictions are close to SOURCE's, but not the same. Both
    models are compared on held-out text, and OUTPUT's model card reports the
    differences.

    Intermediate results are kept in OUTPUT.partial. After an interruption, the
    same command resumes from there.
    """
    with one_clear_line(kept=Path(f"{Path(output)}.partial")):
        import torch

        from modeling_gated.absorption import AbsorptionError, AbsorptionSettings, absorb_checkpoint

        if dtype not in (None, "bfloat16", "float32"):
            raise AbsorptionError(f"--dtype must be bfloat16 or float32, got {dtype}")
        done = absorb_checkpoint(
            checkpoint,
            output,
            text=text or (),
            settings=AbsorptionSettings(distill_tokens=distill_tokens, sample_tokens=sample_tokens, seed=seed),
            dtype=None if dtype is None else getattr(torch, dtype),
            device=find_device(device),
            overwrite=overwrite,
            revision=revision,
            progress=True,
        )
    _print_summary(done)


def _print_summary(done: "Absorption") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from modeling_gated.absorption.card import quality_rows, sink_rows

    for head, *rows in (quality_rows(done.comparisons), sink_rows(done.comparisons)):
        table = Table(box=None, pad_edge=False)
        for number, name in enumerate(head):
            table.add_column(Text(str(name)), justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(value)) for value in row))
        Console(soft_wrap=True).print(table, "")
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)
    print_lines({"seconds": f"{sum(done.seconds.values()):,.0f}", "result": done.output})

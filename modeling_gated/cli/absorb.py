"""The subcommand that absorbs attention sinks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modeling_gated.defaults import DISTILL_TOKENS, SAMPLE_TOKENS, SEED

from .models import find_device
from .options import Device, Overwrite, Revision, Source
from .output import one_clear_line, print_lines


if TYPE_CHECKING:
    from modeling_gated.absorption import Absorption


def absorb(
    checkpoint: Source,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The directory to make.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file, UTF-8, to distil on, a kind of text of its own; may be given several times.",
            show_default="a novel, Python's reference and its library's code",
        ),
    ] = None,
    distill_tokens: Annotated[int, typer.Option(help="How many tokens to distil on.")] = DISTILL_TOKENS,
    sample_tokens: Annotated[
        int, typer.Option(help="How many tokens the model writes itself, before: half chats, half whatever it says.")
    ] = SAMPLE_TOKENS,
    seed: Annotated[int, typer.Option(help="Of the windows that are drawn and the text that is sampled.")] = SEED,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What to compute in: bfloat16 or float32.",
            show_default="float32 on a CPU, with matmuls in bfloat16 if it has instructions for them; else "
            "bfloat16, if SOURCE is, or float32",
        ),
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """
    Absorb attention sinks: OUTPUT predicts nearly what SOURCE does, without sinks and massive activations.

    Gates take over what the sinks did; then the model is distilled from SOURCE. What is made on the way is kept in
    OUTPUT.partial, and the same command goes on from there. How near it comes is measured, and said in OUTPUT's model
    card.
    """
    with one_clear_line(kept=Path(f"{Path(output)}.partial")):
        import torch

        from modeling_gated.absorption import AbsorptionError, AbsorptionSettings, absorb_checkpoint

        if dtype not in (None, "bfloat16", "float32"):
            raise AbsorptionError(f"--dtype {dtype}: is neither bfloat16 nor float32")
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

"""The gated-llama command. Torch and Transformers are imported by the subcommands that need them."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Literal

import typer


if TYPE_CHECKING:
    from modeling_gated.conversion import Conversion


app = typer.Typer(
    help="Attention output gates (arXiv 2505.06708) for Llama-family checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Llama, Mistral, Qwen2 or Qwen3 checkpoint: a directory, a safetensors or GGUF file.",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The directory to make.")],
    granularity: Annotated[
        Literal["headwise", "elementwise"], typer.Option(help="One gate per head, or per channel of each head.")
    ] = "headwise",
    gate_init: Annotated[float, typer.Option(help="The opening that gates start from, between 0 and 1.")] = 0.85,
    place: Annotated[
        Literal["auto", "reflink", "link", "copy"],
        typer.Option(
            help="How the source's shards get into OUTPUT: sharing blocks (reflink), as hard links (link: writing into "
            "one later changes SOURCE too) or as copies. auto: reflink where the filesystem can, else copy."
        ),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is a checkpoint.")] = False,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Dtype of a GGUF file's dequantized tensors; bfloat16 if not given."),
    ] = None,
) -> None:
    """Add open gates to a checkpoint: OUTPUT computes exactly what SOURCE does."""
    try:
        import torch

        from modeling_gated.conversion import ConversionError, convert_checkpoint
    except ImportError as error:  # of a Transformers that is too old, for one
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None

    try:
        done = convert_checkpoint(
            source,
            output,
            granularity=granularity,
            gate_init=gate_init,
            place=place,
            overwrite=overwrite,
            dtype=getattr(torch, dtype) if dtype is not None else None,
            progress=True,
        )
    except ConversionError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None

    _print_summary(done)


def _print_summary(done: "Conversion") -> None:
    from rich.filesize import decimal

    config = done.config
    share = 100 * done.gate_parameters / done.base_parameters
    lines = {
        "gates": f"{config.gate_granularity} in {config.num_hidden_layers} layers, opening {config.gate_init}",
        "parameters added": f"{done.gate_parameters:,} ({share:.2g} % of {done.base_parameters:,})",
        "weights written": decimal(done.written_bytes),
        "weights shared": f"{decimal(done.shared_bytes)} with the source",
        "seconds": f"{done.seconds:.1f}",
        "result": done.output,
    }
    if not done.shared_bytes:
        del lines["weights shared"]
    for label, value in lines.items():
        typer.echo(f"{label:18}{value}")

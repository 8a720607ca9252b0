"""Arguments and options that several subcommands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from modeling_gated import defaults


# Titles of the boxes that --help draws around options.
LONGER_CONTEXT, COMPUTE, REPORT = "Longer context", "Compute", "Report"

Place = Annotated[
    defaults.Place,
    typer.Option(
        metavar="MODE",
        help="How shards get into OUTPUT: reflink (the copy shares disk blocks), link (hard link), copy or auto. link "
        "is instant, but a later write to either file changes both. auto: reflink if the filesystem can, otherwise "
        "copy.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUTPUT if it is a checkpoint or an empty directory.")
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Maximum input length of OUTPUT, in tokens.",
        show_default="SOURCE's",
        rich_help_panel=LONGER_CONTEXT,
    ),
]
RopeTheta = Annotated[
    float | None,
    typer.Option(
        metavar="BASE",
        help="RoPE base (rope_theta) for the longer context.",
        show_default="NTK-aware rule",
        rich_help_panel=LONGER_CONTEXT,
    ),
]
Yarn = Annotated[
    bool,
    typer.Option("--yarn", help="Use YaRN instead of a larger RoPE base.", rich_help_panel=LONGER_CONTEXT),
]
Factor = Annotated[
    float | None,
    typer.Option(
        metavar="RATIO",
        help="Expected YaRN factor, new length / original length. Another value is refused.",
        show_default="computed",
        rich_help_panel=LONGER_CONTEXT,
    ),
]
# Hidden: at 80 columns the list of options cuts the flag off, so the commands' help texts describe the option.
OriginalLength = Annotated[int | None, typer.Option(min=1, metavar="TOKENS", hidden=True)]
ReplaceScaling = Annotated[
    bool,
    typer.Option(
        "--replace-scaling",
        help="Remove RoPE scaling that SOURCE already has, YaRN included.",
        rich_help_panel=LONGER_CONTEXT,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the hub.", show_default="main"),
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint: a directory, a safetensors or GGUF file, or the id of a model on the Hugging Face hub.",
    ),
]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="Directory to create.")]
TextFile = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text file.", show_default="Python's language reference"),
]
Dtype = Annotated[
    Literal["auto", defaults.DtypeName],
    typer.Option(
        metavar="DTYPE",
        help="Dtype of the weights: bfloat16, float16, float32 or auto. auto: the checkpoint's dtype, or bfloat16 for "
        "a GGUF file.",
        rich_help_panel=COMPUTE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Torch device, such as cuda:0 or cpu.",
        show_default="cuda if available, otherwise cpu",
        rich_help_panel=COMPUTE,
    ),
]

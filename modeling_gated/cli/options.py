"""Arguments and options that several subcommands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from modeling_gated import defaults


Place = Annotated[
    defaults.Place,
    typer.Option(
        help="How shards get into OUTPUT: sharing blocks (reflink), as hard links (link: instant, but writing into one "
        "later changes the other too) or as copies. auto: reflink where the filesystem can, else copy."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is a checkpoint.")]
ContextLength = Annotated[
    int | None, typer.Option(min=1, help="Extend the context to this many tokens.", show_default="the source's")
]
RopeTheta = Annotated[
    float | None,
    typer.Option(help="The base of RoPE for the longer context.", show_default="by the rule in the README"),
]
Yarn = Annotated[bool, typer.Option("--yarn", help="Extend the context by YaRN instead of a larger base.")]
Factor = Annotated[float | None, typer.Option(help="YaRN's factor, if you want it checked against the lengths.")]
OriginalLength = Annotated[
    int | None, typer.Option(min=1, help="The length the model was trained at.", show_default="max_position_embeddings")
]
ReplaceScaling = Annotated[
    bool, typer.Option("--replace-scaling", help="Take away a scaling of RoPE that is there already, YaRN's too.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A checkpoint: a directory, a safetensors or GGUF file, or the id of a model on the Hugging Face hub.",
    ),
]
TextFile = Annotated[
    Path | None, typer.Option("--text", help="A text file, UTF-8.", show_default="Python's language reference")
]
Dtype = Annotated[
    Literal["auto", defaults.DtypeName],
    typer.Option(help="auto: the checkpoint's own; bfloat16 for a GGUF file."),
]
Device = Annotated[str | None, typer.Option(help="Such as cuda:0 or cpu.", show_default="cuda if there is one")]

"""The subcommands that convert, verify, extend, ungate and repair checkpoints."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modeling_gated import defaults
from modeling_gated.errors import printable

from .options import (
    LONGER_CONTEXT,
    ContextLength,
    Factor,
    OriginalLength,
    Output,
    Overwrite,
    Place,
    ReplaceScaling,
    Revision,
    RopeTheta,
    Source,
    Yarn,
)
from .output import one_clear_line, print_lines


if TYPE_CHECKING:
    from modeling_gated.checkpoints.safetensors_file import NewTensor
    from modeling_gated.configuration import GatedLlamaConfig
    from modeling_gated.conversion import Conversion, ExtendedCheckpoint, Plan


def _context(
    length: int | None,
    rope_theta: float | None,
    yarn: bool,
    factor: float | None,
    original_max_position_embeddings: int | None,
    replace_scaling: bool,
) -> dict[str, Any] | None:
    """
    Return the arguments of `extend_context` that the user gave, or None without `length`.

    Raises:
        typer.BadParameter: if another of them is given without `length`.
    """
    numbers = {"rope_theta": rope_theta, "factor": factor}
    numbers["original_max_position_embeddings"] = original_max_position_embeddings
    options: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    if replace_scaling:
        options["replace_scaling"] = True
    if yarn:
        options["method"] = "yarn"
    if length is None:
        if options:
            flag = "yarn" if yarn else next(iter(options)).replace("_", "-")
            raise typer.BadParameter(f"--{flag} needs --context-length; add --context-length TOKENS")
        return None
    return {"length": length} | options


def convert(
    source: Source,
    output: Output,
    granularity: Annotated[
        defaults.Granularity | None,
        typer.Option(
            metavar="KIND",
            help="headwise: one gate per head. elementwise: one gate per channel of each head. A SOURCE that already "
            "has gates keeps them.",
            show_default=defaults.GRANULARITY,
        ),
    ] = None,
    gate_init: Annotated[
        float | None,
        typer.Option(
            metavar="OPENING",
            help="Opening sigmoid(b) that gates start from, greater than 0 and less than 1.",
            show_default=str(defaults.GATE_INIT),
        ),
    ] = None,
    place: Place = defaults.PLACE,
    overwrite: Overwrite = False,
    dtype: Annotated[
        defaults.DtypeName | None,
        typer.Option(
            metavar="DTYPE",
            help="Dtype of tensors dequantized from a GGUF file: bfloat16, float16 or float32.",
            show_default=defaults.GGUF_DTYPE,
        ),
    ] = None,
    revision: Revision = None,
    context_length: ContextLength = None,
    rope_theta: RopeTheta = None,
    yarn: Yarn = False,
    factor: Factor = None,
    original_max_position_embeddings: OriginalLength = None,
    replace_scaling: ReplaceScaling = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the planned files and write nothing.")] = False,
) -> None:
    """
    Add attention gates to a checkpoint.

    Example: gated-llama convert HuggingFaceTB/SmolLM2-135M-Instruct build/gated

    The outputs stay bit-identical to SOURCE's: every gate starts at exactly 1.
    With --context-length the context is extended too, as by gated-llama extend.
    --original-max-position-embeddings TOKENS sets the length that the model was
    trained at. The default is max_position_embeddings.
    """
    with one_clear_line():
        import torch

        from modeling_gated.conversion import convert_checkpoint, plan_conversion

        options: dict[str, Any] = {
            "granularity": granularity,
            "gate_init": gate_init,
            "place": place,
            "overwrite": overwrite,
            "dtype": getattr(torch, dtype) if dtype is not None else None,
            "revision": revision,
            "context": _context(
                context_length, rope_theta, yarn, factor, original_max_position_embeddings, replace_scaling
            ),
        }
        if dry_run:
            _print_plan(plan_conversion(source, output, **options))
        else:
            _print_summary(convert_checkpoint(source, output, **options, progress=True))


def verify(
    source: Source,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Gated checkpoint converted from SOURCE.")],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="UTF-8 text file to compare logits on.", show_default="Python's language reference"
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(max=10_000_000, metavar="N", help="Tokens of the text to compare logits on.")
    ] = defaults.VERIFIED_TOKENS,
    revision: Revision = None,
) -> None:
    """
    Check that a converted checkpoint computes the same function as its source.

    Example: gated-llama verify HuggingFaceTB/SmolLM2-135M-Instruct build/gated

    Tensors, config and code are compared first. Then come both models' logits
    and cached generation, with one layer in memory at a time.

    The exit code is 0 if both are the same function, otherwise 1. OUTPUT's
    model card and manifest record the result.
    """
    with one_clear_line():
        from modeling_gated.conversion import verify_checkpoint
        from modeling_gated.evaluation.text import read_text

        read_text(None if text is None else Path(text))
        verification = verify_checkpoint(source, output, text=text, tokens=tokens, revision=revision, progress=True)
    lines = {label.replace("_", " "): value for label, value in verification.summary().items()}
    print_lines(lines | {"recorded": "in the model card and the manifest" if verification.recorded else "no"})
    if not verification.passed:
        raise typer.Exit(1)


def ungate(
    gated: Annotated[str, typer.Argument(metavar="GATED", help="Checkpoint that gated-llama convert wrote.")],
    output: Output,
    place: Place = defaults.PLACE,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """
    Restore the source's files, byte for byte.

    Example: gated-llama ungate build/gated build/source-again

    Gates that were trained or changed since conversion are refused.
    """
    with one_clear_line():
        from modeling_gated.conversion import ungate_checkpoint

        done = ungate_checkpoint(gated, output, place=place, overwrite=overwrite, revision=revision, progress=True)
    print_lines({"files restored": f"{len(done.files)}", "result": done.output})
    _print_left_out(done.left_out, "not restored, because conversion left them out")


def refresh_code(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Directory of a gated checkpoint that includes its model code.")
    ],
) -> None:
    """
    Update the model code in a gated checkpoint to this version.

    Example: gated-llama refresh-code build/gated

    trust_remote_code=True runs this code. Code from before a change in
    Transformers may generate wrong text, or refuse to generate.
    Apart from the code, only the manifest is updated.
    """
    with one_clear_line():
        from modeling_gated.conversion import refresh_code

        done = refresh_code(checkpoint)
    print_lines({"replaced": ", ".join(done.files) or "nothing: the code is up to date", "result": done.directory})
    if done.had_verification:
        typer.echo("note: the model card's verification is for the old code; run gated-llama verify again", err=True)


def repair_tokenizer(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Directory of a gated checkpoint.")],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Checkpoint that CHECKPOINT was converted from: a path or a model on the hub.",
            show_default="from the manifest",
        ),
    ] = None,
) -> None:
    """
    Restore the source's tokenizer in a checkpoint that an earlier version converted.

    Example: gated-llama repair-tokenizer build/gated

    Transformers picks a tokenizer's class by the model type. Checkpoints from
    earlier versions may therefore tokenize differently from their source.
    Conversion now writes the class into the checkpoint. No weights are written.
    """
    with one_clear_line():
        from modeling_gated.conversion import repair_tokenizer

        done = repair_tokenizer(checkpoint, source)
    print_lines(
        {
            "replaced": ", ".join(done.files) or "nothing: the tokenizer already matches the source's",
            "result": done.directory,
        }
    )


def extend(
    checkpoint: Source,
    output: Output,
    context_length: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Maximum input length of OUTPUT, in tokens.",
            rich_help_panel=LONGER_CONTEXT,
        ),
    ],
    rope_theta: RopeTheta = None,
    yarn: Yarn = False,
    factor: Factor = None,
    original_max_position_embeddings: OriginalLength = None,
    replace_scaling: ReplaceScaling = False,
    place: Place = defaults.PLACE,
    overwrite: Overwrite = False,
    revision: Revision = None,
) -> None:
    """
    Extend the context length of a checkpoint, gated or not.

    Example: gated-llama extend build/gated build/longer --context-length 16384

    The default method is a larger RoPE base. Train at the new length
    afterwards. YaRN needs no training. Weights stay unchanged.

    --original-max-position-embeddings TOKENS sets the length that the model was
    trained at. The default is max_position_embeddings.
    """
    with one_clear_line():
        from modeling_gated.conversion import extend_checkpoint

        context = _context(context_length, rope_theta, yarn, factor, original_max_position_embeddings, replace_scaling)
        done = extend_checkpoint(
            checkpoint,
            output,
            context=context or {},
            place=place,
            overwrite=overwrite,
            revision=revision,
            progress=True,
        )
    _print_extension(done)


def _print_plan(plan: "Plan") -> None:
    from rich.filesize import decimal

    from modeling_gated.configuration import describe_context

    config = plan.architecture.config
    print_lines(
        {
            "source": f"{plan.source.path}" + (f" ({plan.source.revision})" if plan.source.revision else ""),
            "model": f"{plan.checkpoint.raw_config['model_type']}, {plan.base_parameters:,} parameters",
            "gates": _gates(config),
            "context": describe_context(config),
            "tensors to add": f"{len(plan.gates)}, {plan.gate_parameters:,} parameters",
        }
    )
    for name, shape in _kinds(plan.gates).items():
        typer.echo(f"  {name} {shape}")
    typer.echo("files")
    for name, size, origin in plan.files():
        typer.echo(f"  {printable(name):36} {decimal(size) if size is not None else '':>9}  {printable(origin)}")
    _print_unread(plan.architecture.unread)
    _print_tokenizer_error(plan.tokenizer_error)
    _print_notes(plan.architecture.index_notes + plan.architecture.config_notes)
    _print_left_out(plan.left_out, "not to be copied")
    typer.echo("nothing was written (--dry-run)")


def _kinds(gates: dict[str, "NewTensor"]) -> dict[str, list[int]]:
    """Return the names and shapes of gate tensors, one entry for all layers."""
    return {re.sub(r"layers\.\d+", "layers.*", name): list(tensor.shape) for name, tensor in gates.items()}


def _gates(config: "GatedLlamaConfig") -> str:
    opening = f", opening {config.gate_init}" if config.gate_bias and config.gate_scale != 1 else ", from the source"
    return f"{config.gate_granularity} in {config.num_hidden_layers} layers{opening}"


def _print_summary(done: "Conversion") -> None:
    from modeling_gated.configuration import describe_context

    share = 100 * done.gate_parameters / done.base_parameters
    lines = {
        "gates": _gates(done.config),
        "context": describe_context(done.config),
        "gate parameters": f"{done.gate_parameters:,} ({share:.2g} % of {done.base_parameters:,})",
    }
    print_lines(lines | _written(done))
    _print_unread(done.unread)
    _print_tokenizer_error(done.tokenizer_error)
    _print_notes(done.index_notes + done.config_notes)
    _print_left_out(done.left_out, "not copied")
    _print_tokenizer(done.tokenizer_length)


def _print_extension(done: "ExtendedCheckpoint") -> None:
    print_lines({"before": done.before, "after": done.after} | _written(done))
    _print_notes(done.index_notes)
    _print_left_out(done.left_out, "not copied")
    _print_tokenizer(done.tokenizer_length)


def _written(done: "Conversion | ExtendedCheckpoint") -> dict[str, object]:
    from rich.filesize import decimal

    shared = {"weights shared": f"{decimal(done.shared_bytes)} with the source"} if done.shared_bytes else {}
    written = {"weights written": decimal(done.written_bytes)}
    return written | shared | {"seconds": f"{done.seconds:.1f}", "result": done.output}


def _print_tokenizer(length: int | None) -> None:
    if length is not None:
        typer.echo(
            f"note: tokenizer_config.json has model_max_length={length}; tokenizers warn about longer inputs, and "
            "truncate if asked to",
            err=True,
        )


def _print_tokenizer_error(error: str | None) -> None:
    if error is not None:
        typer.echo(f"note: the tokenizer files are copied but not compared: {error}", err=True)


def _print_unread(unread: tuple[str, ...]) -> None:
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        names = printable(", ".join(unread[:3]))
        typer.echo(f"note: the model does not use these tensors of the source: {names}{more}", err=True)


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        typer.echo(f"note: {printable(note)}", err=True)


def _print_left_out(left_out: dict[str, int], what: str) -> None:
    from rich.filesize import decimal

    if left_out:
        largest = sorted(left_out, key=lambda name: (-left_out[name], name))[:3]
        names = ", ".join(f"{name} ({decimal(left_out[name])})" for name in largest)
        more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        total = f"{len(left_out):,} of the source's files ({decimal(sum(left_out.values()))})"
        typer.echo(f"note: {what}: {total}: {printable(names)}{more}", err=True)

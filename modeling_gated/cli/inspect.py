"""The subcommand that measures attention sinks, activations and gates."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modeling_gated.defaults import INSPECTED_WINDOW_TOKENS, INSPECTED_WINDOWS, INTERVENTIONS

from .models import find_device, find_models, load_model, names_of
from .options import REPORT, Device, Dtype, TextFile
from .output import check_report_files, one_clear_line


if TYPE_CHECKING:
    from modeling_gated.inspection import ModelReport


def inspect(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Directories with safetensors, GGUF files or models on the hub. Gated or not: any causal language "
            "model that Transformers loads.",
        ),
    ],
    text: TextFile = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Directory for report.html and report.json.",
            show_default="none",
            rich_help_panel=REPORT,
        ),
    ] = None,
    png: Annotated[
        bool,
        typer.Option("--png", help="Also write each picture as a PNG into REPORT/pictures.", rich_help_panel=REPORT),
    ] = False,
    windows: Annotated[
        int, typer.Option(metavar="N", help="Windows of text to measure on, spread over the text.")
    ] = INSPECTED_WINDOWS,
    length: Annotated[int, typer.Option(metavar="N", help="Length of a window in tokens.")] = INSPECTED_WINDOW_TOKENS,
    interventions: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="Changes whose effect on the loss is measured, separated by commas, or none. Also available: "
            "window=128 (sliding-window attention), window=128+4 (and the first four tokens), int8_weights, "
            "int8_activations, gates=0.5, gates=0.5@LAYER, gates=0.5@LAYER.HEAD. Models without gates skip changes of "
            "gates.",
            show_default=", ".join(INTERVENTIONS),
        ),
    ] = ",".join(INTERVENTIONS),
    dtype: Dtype = "auto",
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing report.", rich_help_panel=REPORT)
    ] = False,
) -> None:
    """
    Measure attention sinks, activations and gates on real text.

    Example: gated-llama inspect build/gated --report build/report

    Prints a summary, with several models side by side. --report also writes
    an HTML page with explanations and pictures, and all numbers as JSON.
    """
    with one_clear_line():
        from modeling_gated.evaluation.plot import check_plots
        from modeling_gated.evaluation.text import read_text
        from modeling_gated.inspection import InspectionError, inspect_model
        from modeling_gated.inspection.report.page import (
            JSON,
            PAGE,
            PICTURE_FOLDER,
            as_json,
            as_page,
            remove_pictures,
            write_pictures,
        )
        from modeling_gated.inspection.report.report import check_settings

        if png and report is None:
            raise InspectionError("--png needs --report; add --report DIRECTORY")
        chosen = [] if interventions.strip() == "none" else [word.strip() for word in interventions.split(",")]
        check_settings(windows, length, chosen)
        words, text_name = read_text(text)
        if report is not None:
            check_plots()
            check_report_files(report, (JSON, PAGE), overwrite, folders=(PICTURE_FOLDER,) if png else ())
        paths, target = find_models(models), find_device(device)
        options: dict[str, Any] = {
            "text_name": text_name,
            "windows": windows,
            "window_tokens": length,
            "interventions": chosen,
        }
        reports: list[ModelReport] = []
        for path, name in zip(paths, names_of(models), strict=True):
            model, tokenizer = load_model(path, dtype, target)
            reports.append(inspect_model(model, tokenizer, words, name=name, progress=True, **options))
            del model  # free memory before the next model is loaded
        _print_summary(reports)
        if report is not None:
            from modeling_gated.checkpoints.replacement import replace_file

            contents = {JSON: as_json(reports).encode(), PAGE: as_page(reports).encode()}
            report.mkdir(parents=True, exist_ok=True)
            remove_pictures(report / PICTURE_FOLDER)
            pictures = write_pictures(reports, report / PICTURE_FOLDER) if png else []
            for name, content in contents.items():
                replace_file(report / name, content)
            more = f", {len(pictures)} pictures in {report / PICTURE_FOLDER}" if png else ""
            typer.echo(f"written: {report / PAGE}, {report / JSON}{more}")


def _print_summary(reports: "list[ModelReport]") -> None:
    """Print the summary rows as a table, one column per model, and the notes to stderr."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from modeling_gated.inspection.report.page import rows_of

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for report in reports:
        table.add_column(Text(report.name), justify="right", overflow="fold")
    for row, values in rows_of(reports):
        table.add_row(row.label, *values)
    for change in dict.fromkeys(change.name for report in reports for change in report.interventions):
        differences = [
            next((applied for applied in report.interventions if applied.name == change), None) for report in reports
        ]
        values = [
            "-" if applied is None else "not finite" if applied.difference is None else f"{applied.difference:+.4f}"
            for applied in differences
        ]
        table.add_row(f"loss, {change}", *values)
    Console(soft_wrap=True).print(table)
    for report in reports:
        for note in report.notes:
            typer.echo(f"note: {report.name}: {note}", err=True)

"""
Compare gated-llama absorb with ablations: steps left out, other seeds and other token budgets, as a table and a plot.

    python examples/recipes/absorption_controls.py [--budgets 20000] [--seeds 0] [--checkpoint FOLDER] [--output FOLDER]

The variant "absorbed" leaves no step out and runs with all budgets and seeds. Other variants run with the first budget
and the first seed. The default budgets for distillation, sampling and calibration data are smaller than those of
gated-llama absorb. Each result is a checkpoint in the output folder. Interrupted runs resume, and finished checkpoints
are kept. The table and the plot include every absorbed checkpoint in the folder, also from gated-llama absorb.
"""

import json
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from modeling_gated.absorption import AbsorptionError, AbsorptionSettings, absorb_checkpoint
from modeling_gated.checkpoints.sources import find_source
from modeling_gated.conversion import ConversionError


# Steps that each variant leaves out. Without the key edit, the neurons that write massive activations stay too, because
# sinks need massive activations. The last two variants have no edit and train on the same loss. Their gates start at 1;
# gates of layers with sinks are trained in "identity gates", and no gates in "self-distilled".
VARIANTS: dict[str, dict[str, bool]] = {
    "absorbed": {},
    "key edit without gates": {"edits_gates": False, "trains_gates": False},
    "gates without key edit": {"edits_keys": False, "removes_writers": False},
    "identity gates": {"edits_keys": False, "removes_writers": False, "edits_gates": False},
    "self-distilled": {"edits_keys": False, "removes_writers": False, "edits_gates": False, "trains_gates": False},
}
KINDS = ("prose", "documentation", "code", "chat")


def name_of(variant: str, tokens: int, seed: int) -> str:
    """Return the folder name of a run."""
    return f"{variant.replace(' ', '-')}-{tokens}-seed{seed}"


def wanted(variants: list[str], budgets: list[int], seeds: list[int]) -> list[tuple[str, int, int]]:
    """Return variant, tokens and seed of each run."""
    runs = [(variant, budgets[0], seeds[0]) for variant in variants]
    if "absorbed" in variants:
        runs += [("absorbed", *rest) for rest in product(budgets, seeds)]
    return list(dict.fromkeys(runs))


def read_reports(output: Path) -> dict[str, dict[str, Any]]:
    """Return the reports of all checkpoints in a folder by name, in the order of distilled tokens."""
    paths = sorted(output.glob("*/absorption.json"))
    reports = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return dict(sorted(reports.items(), key=lambda named: named[1]["distilled_tokens"]))


def comparison(report: dict[str, Any], kind: str, tokens: int) -> dict[str, Any] | None:
    """Return the comparison on a kind of text at a length, on plain windows if available; None if not measured."""
    measured = (
        measurement
        for measurement in report["comparisons"]
        if (measurement["kind"], measurement["window_tokens"]) == (kind, tokens)
    )
    return min(measured, key=lambda measurement: measurement["start"] != "plain", default=None)


def change(report: dict[str, Any], kind: str, tokens: int) -> float | None:
    """Return the change of perplexity in percent."""
    measured = comparison(report, kind, tokens)
    return None if measured is None else 100 * (measured["perplexity_ratio"] - 1)


def changes(report: dict[str, Any], tokens: int) -> list[float]:
    """Return the changes of perplexity in percent for all measured kinds of text."""
    percentages = (change(report, kind, tokens) for kind in KINDS)
    return [percent for percent in percentages if percent is not None]


def mean_of(report: dict[str, Any], field: str) -> float:
    """Return the mean of a measurement of the edited model over texts, on windows of 512 tokens."""
    measured = [
        measurement for measurement in (comparison(report, kind, 512) for kind in KINDS) if measurement is not None
    ]
    if not measured:
        sys.exit(f"error: {report['output']}: must be measured on windows of 512 tokens, got none; absorb it again")
    return statistics.fmean(measurement["edited"][field] for measurement in measured)


def table_of(reports: dict[str, dict[str, Any]]) -> Table:
    """Return a table with a row per checkpoint."""
    table = Table(box=box.MARKDOWN)
    table.add_column("", no_wrap=True)
    headings = ["tokens", "matmuls in", "F-Attn", "other sinks", "largest hidden state"]
    headings += [f"{kind}, {tokens:,}" for tokens in (512, 2048) for kind in KINDS]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, report in reports.items():
        percentages = [change(report, kind, tokens) for tokens in (512, 2048) for kind in KINDS]
        table.add_row(
            name,
            f"{report['distilled_tokens']:,}",
            report["products"],
            f"{mean_of(report, 'first_token_attention'):.4f}",
            f"{mean_of(report, 'sink_rate_other'):.4f}",
            f"{max(measurement['edited']['hidden_state_maximum'] for measurement in report['comparisons']):,.0f}",
            *("-" if percent is None else f"{percent:+.1f} %" for percent in percentages),
        )
    return table


def plot(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the change of perplexity per text, and its mean, over distilled tokens and over remaining F-Attn."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_tokens, by_sinks = figure.subplots(1, 2, sharey=True)
    for number, (name, report) in enumerate(reports.items()):
        places = {by_tokens: report["distilled_tokens"], by_sinks: mean_of(report, "first_token_attention")}
        for (axes, place), (tokens, marker) in product(places.items(), ((512, "o"), (2048, "s"))):
            if percentages := changes(report, tokens):
                color, label = f"C{number % 10}", name if tokens == 512 else None
                axes.plot([place] * len(percentages), percentages, marker, color=color, alpha=0.25, markersize=4)
                axes.plot(place, statistics.fmean(percentages), marker, color=color, label=label)
    for axes in (by_tokens, by_sinks):
        axes.axhline(1, color="gray", linewidth=0.5)
    by_sinks.axvline(0.01, color="gray", linewidth=0.5)
    by_tokens.xaxis.set_major_formatter("{x:,.0f}")
    by_sinks.set_xscale("log")
    by_tokens.set(xlabel="tokens distilled on", ylabel="change of perplexity, %; circles 512, squares 2,048 tokens")
    by_sinks.set(xlabel="attention to the first token (F-Attn)")
    by_sinks.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def check_same(folder: Path, source: str, settings: AbsorptionSettings) -> None:
    """
    Check that an existing checkpoint has the same source and settings. Windows may be shorter.

    Raises:
        SystemExit: if a setting differs.
    """
    report = json.loads((folder / "absorption.json").read_text(encoding="utf-8"))
    made_with = {"checkpoint": report["source"]["name"], **report["settings"]}
    for name, value in ({"checkpoint": source} | vars(settings)).items():
        if made_with[name] != value and not name.endswith("window_tokens"):
            sys.exit(f"error: {folder}: {name} must be {value!r}, got {made_with[name]!r}; choose another --output")


def numbers(text: str, option: str) -> list[int]:
    """Return the integers in a comma-separated option."""
    if not all(word.isdecimal() for word in text.split(",")):
        sys.exit(f"error: {option} must be integers separated by commas, got {text}")
    return [int(word) for word in text.split(",")]


def main(
    checkpoint: Annotated[
        str, typer.Option(help="Source checkpoint: a path or a model on the hub.")
    ] = "build/demo/SmolLM2-135M-Instruct",
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and frontier.png.")] = Path("build/absorption"),
    budgets: Annotated[str, typer.Option(help="Tokens to distil on, separated by commas.")] = "20000",
    seeds: Annotated[str, typer.Option(help="Random seeds, separated by commas.")] = "0",
    variants: Annotated[
        str, typer.Option(help=f"Variants, separated by commas: {', '.join(VARIANTS)}.", show_default="all")
    ] = ",".join(VARIANTS),
    sample_tokens: Annotated[int, typer.Option(help="Tokens that the source model samples.")] = 10_000,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of calibration data.")] = 8_192,
    # More epochs than the default of gated-llama absorb, because there is less calibration data.
    refinement_epochs: Annotated[int, typer.Option(help="Passes over the calibration data.")] = 12,
    measured_windows: Annotated[int, typer.Option(help="Held-out windows of 512 tokens per text.")] = 8,
) -> None:
    """Run the missing variants, and print a table of all checkpoints."""
    names = variants.split(",")
    for name in names:
        if name not in VARIANTS:
            sys.exit(f"error: --variants must be among {', '.join(VARIANTS)}, got {name}")
    output.mkdir(parents=True, exist_ok=True)
    for variant, tokens, seed in wanted(names, numbers(budgets, "--budgets"), numbers(seeds, "--seeds")):
        folder = output / name_of(variant, tokens, seed)
        try:
            settings = AbsorptionSettings(
                distill_tokens=tokens,
                sample_tokens=sample_tokens,
                calibration_tokens=calibration_tokens,
                refinement_epochs=refinement_epochs,
                measured_windows=measured_windows,
                seed=seed,
                **VARIANTS[variant],
            )
            if (folder / "absorption.json").is_file():
                check_same(folder, find_source(checkpoint).name, settings)
                continue
            print(f"making {folder}")
            absorb_checkpoint(checkpoint, folder, settings=settings, progress=True)
        except (AbsorptionError, ConversionError) as error:
            sys.exit(f"error: {error}")
    reports = read_reports(output)
    Console(width=1_000).print(table_of(reports))  # wide enough for all names
    plot(reports, output / "frontier.png")
    print(f"written: {output / 'frontier.png'}")


if __name__ == "__main__":
    typer.run(main)

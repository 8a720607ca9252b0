"""
What absorbing sinks owes to each of its steps, and what it costs in quality: the same budget with steps left out, other
seeds and other budgets, as a table and a plot.

    python examples/recipes/absorption_controls.py [--budgets 20000] [--seeds 0] [--checkpoint FOLDER] [--output FOLDER]

Variants are made with the first budget and the first seed, "absorbed", from which nothing is left out, with all of
them. By default they are distilled on, sampled and fitted to less than gated-llama absorb does by itself. Each is a
checkpoint in the output folder, made as any other: what was interrupted goes on where it was, and what is there is not
made again. The table and the plot have every absorbed checkpoint of the folder, also one that gated-llama absorb made.
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


# What is left out. Without keys edited, writers stay, too, as sinks need what they write. The last two have no edit and
# are trained on the same loss: with gates that are 1 at first and, where there
# are sinks, learn, and with gates that stay 1.
VARIANTS: dict[str, dict[str, bool]] = {
    "absorbed": {},
    "key edit without gates": {"edits_gates": False, "trains_gates": False},
    "gates without key edit": {"edits_keys": False, "removes_writers": False},
    "identity gates": {"edits_keys": False, "removes_writers": False, "edits_gates": False},
    "self-distilled": {"edits_keys": False, "removes_writers": False, "edits_gates": False, "trains_gates": False},
}
KINDS = ("prose", "documentation", "code", "chat")


def name_of(variant: str, tokens: int, seed: int) -> str:
    return f"{variant.replace(' ', '-')}-{tokens}-seed{seed}"


def wanted(variants: list[str], budgets: list[int], seeds: list[int]) -> list[tuple[str, int, int]]:
    """Variant, tokens and seed of each run."""
    runs = [(variant, budgets[0], seeds[0]) for variant in variants]
    if "absorbed" in variants:
        runs += [("absorbed", *rest) for rest in product(budgets, seeds)]
    return list(dict.fromkeys(runs))


def read_reports(output: Path) -> dict[str, dict[str, Any]]:
    """The reports of all checkpoints in a folder, by their names, those first that were distilled on the least."""
    paths = sorted(output.glob("*/absorption.json"))
    reports = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return dict(sorted(reports.items(), key=lambda named: named[1]["distilled_tokens"]))


def comparison(report: dict[str, Any], kind: str, tokens: int) -> dict[str, Any] | None:
    """What was measured on windows of some text, if it was: plain ones, if there are such of that length."""
    measured = (
        measurement
        for measurement in report["comparisons"]
        if (measurement["kind"], measurement["window_tokens"]) == (kind, tokens)
    )
    return min(measured, key=lambda measurement: measurement["start"] != "plain", default=None)


def change(report: dict[str, Any], kind: str, tokens: int) -> float | None:
    """Of perplexity, in percent."""
    measured = comparison(report, kind, tokens)
    return None if measured is None else 100 * (measured["perplexity_ratio"] - 1)


def changes(report: dict[str, Any], tokens: int) -> list[float]:
    """Of all kinds of text that were measured."""
    percentages = (change(report, kind, tokens) for kind in KINDS)
    return [percent for percent in percentages if percent is not None]


def mean_of(report: dict[str, Any], field: str) -> float:
    """Of the edited model, over texts at 512 tokens."""
    measured = [
        measurement for measurement in (comparison(report, kind, 512) for kind in KINDS) if measurement is not None
    ]
    if not measured:
        sys.exit(f"error: {report['output']}: was not measured on windows of 512 tokens")
    return statistics.fmean(measurement["edited"][field] for measurement in measured)


def table_of(reports: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column("", no_wrap=True)
    headings = ["tokens", "products in", "F-Attn", "other sinks", "largest hidden state"]
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
    """What is lost, of each kind of text and on average, against the tokens spent and against what is left of sinks."""
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
    """See that what is there was made of the same source with the same settings, of which windows may be shorter."""
    report = json.loads((folder / "absorption.json").read_text(encoding="utf-8"))
    made_with = {"checkpoint": report["source"]["name"], **report["settings"]}
    for name, value in ({"checkpoint": source} | vars(settings)).items():
        if made_with[name] != value and not name.endswith("window_tokens"):
            sys.exit(
                f"error: {folder}: was made with {name}={made_with[name]!r}, not {value!r}; choose another --output"
            )


def numbers(text: str, option: str) -> list[int]:
    """The parts of a comma-separated option."""
    if not all(word.isdecimal() for word in text.split(",")):
        sys.exit(f"error: {option} {text}: not numbers with commas between them")
    return [int(word) for word in text.split(",")]


def main(
    checkpoint: str = "build/demo/SmolLM2-135M-Instruct",
    output: Path = Path("build/absorption"),
    budgets: Annotated[str, typer.Option(help="Tokens to distil on.")] = "20000",
    seeds: str = "0",
    variants: str = ",".join(VARIANTS),
    sample_tokens: int = 10_000,
    calibration_tokens: int = 8_192,
    refinement_epochs: int = 12,  # more than by default, as there is less to see
    measured_windows: int = 8,
) -> None:
    """Make what is not there yet, and print a table of all."""
    names = variants.split(",")
    for name in names:
        if name not in VARIANTS:
            sys.exit(f"error: --variants {name}: not one of {', '.join(VARIANTS)}")
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
    Console(width=1_000).print(table_of(reports))  # names are never cut
    plot(reports, output / "frontier.png")
    print(f"written: {output / 'frontier.png'}")


if __name__ == "__main__":
    typer.run(main)

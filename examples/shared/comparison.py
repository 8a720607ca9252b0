"""Comparison of gated models with ungated baselines over several seeds: a table, a JSON file and a plot."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from examples.shared.recipe import KINDS, RESULT


Runs = dict[str, dict[int, dict[str, Any]]]  # result by kind and seed


def report(output: Path, seeds: list[int]) -> None:
    """Write OUTPUT/results.json and OUTPUT/comparison.png from the results of all runs, and print the table."""
    runs: Runs = {
        kind: {seed: json.loads((output / f"{kind}-seed{seed}" / RESULT).read_text(encoding="utf-8")) for seed in seeds}
        for kind in KINDS
    }
    rows = {
        "trainable parameters": {kind: f"{of[seeds[0]]['trainable_parameters']:,}" for kind, of in runs.items()},
        "loss before": _of_moment(runs, "before", "loss"),
        "loss after": _of_moment(runs, "after", "loss"),
        "loss after - before": {
            kind: spread([of[seed]["after"]["loss"] - of[seed]["before"]["loss"] for seed in seeds])
            for kind, of in runs.items()
        },
        "mean gate after": _of_moment(runs, "after", "gate"),
        "gate drift, mean distance from 1": _of_moment(runs, "after", "gate_drift"),
        "first-token attention before": _of_moment(runs, "before", "first_token_attention"),
        "first-token attention after": _of_moment(runs, "after", "first_token_attention"),
    }
    differences = [runs["gated"][seed]["after"]["loss"] - runs["control"][seed]["after"]["loss"] for seed in seeds]
    summary = f"loss after, gated - control, per seed: {spread(differences)}"
    results = {"runs": runs, "gated - control": differences}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(runs, output / "comparison.png")

    table = Table(box=box.MARKDOWN)
    table.add_column(f"mean (min to max) of {len(seeds)} seeds")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(row[kind] for kind in KINDS))
    console = Console(width=120, highlight=False)
    console.print(table)
    console.print(summary)
    console.print(f"{output / 'results.json'}, {output / 'comparison.png'}")


def _of_moment(runs: Runs, moment: str, name: str) -> dict[str, str]:
    values_by_kind = {
        kind: [run[moment][name] for run in of.values() if name in run[moment]] for kind, of in runs.items()
    }
    return {kind: spread(values) if values else "" for kind, values in values_by_kind.items()}


def spread(values: list[float]) -> str:
    """Return mean and range as text."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def plot(runs: Runs, path: Path) -> None:
    """Plot training losses, mean of the seeds, and their difference per seed, which is free of noise from batches."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = {kind: np.array([_smooth(run["losses"]) for run in of.values()]) for kind, of in runs.items()}
    steps = np.arange(1, losses["gated"].shape[1] + 1)
    for (kind, values), style in zip(losses.items(), ("-", "--"), strict=True):
        left.plot(steps, values.mean(0), style, label=kind)
    left.set(xlabel="step", ylabel="training loss, nats per token", title="training, mean of the seeds")
    left.legend()
    for number, seed in enumerate(runs["gated"]):
        right.plot(steps, losses["gated"][number] - losses["control"][number], label=f"seed {seed}")
    right.axhline(0, color="gray", linewidth=0.5)
    right.set(xlabel="step", ylabel="nats per token", title="training loss, gated - control")
    right.legend()
    figure.savefig(path, dpi=150)


def _smooth(losses: list[float], share: float = 0.1) -> np.ndarray:
    """Return the running mean over a tenth of the steps."""
    width = max(1, round(share * len(losses)))
    padded = np.concatenate([np.full(width - 1, losses[0]), losses])
    return np.convolve(padded, np.full(width, 1 / width), "valid")

"""Table and plot of losses by position for several models."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table


RESULTS = "results.json"


def write_report(losses: dict[str, torch.Tensor], lengths: dict[str, int], output: Path) -> None:
    """
    Write OUTPUT/loss_by_position.png, and OUTPUT/results.json with mean losses in buckets of positions.

    Args:
        losses: loss of each model at each position, [longest length], in nats.
        lengths: context length of the first model and after each step of the recipe, in tokens, ascending.
        output: folder for the files.
    """
    plot(losses, lengths, output / "loss_by_position.png")
    short, longest = min(lengths.values()), max(lengths.values())
    doubled = {short * 2**power for power in range(math.ceil(math.log2(longest / short)))}
    buckets = list(pairwise(sorted({0, *lengths.values()} | doubled)))
    results = {
        "tokens before": [[begin + 1, end] for begin, end in buckets],
        "loss": {name: [loss[slice(*bucket)].mean().item() for bucket in buckets] for name, loss in losses.items()},
    }
    partial = output / "results.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.rename(output / RESULTS)


def plot(losses: dict[str, torch.Tensor], lengths: dict[str, int], path: Path) -> None:
    """Plot means over half octaves of positions, because single positions are noisy."""
    longest = max(lengths.values())
    begin = min(32, longest // 2)  # losses of the first tokens are high and noisy
    edges = np.unique(np.geomspace(begin, longest, 2 * round(math.log2(longest / begin)) + 1).astype(int))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, loss), style in zip(losses.items(), (":", "--", "-", "-."), strict=True):
        means = [loss[slice(*bucket)].mean().item() for bucket in pairwise(edges)]
        axes.plot(np.sqrt(edges[:-1] * edges[1:]), means, style, label=name)
    for name, length in lengths.items():
        axes.axvline(length, color="gray", linewidth=0.5)
        axes.annotate(f"{name}: {length:,} ", (length, 0.98), xycoords=axes.get_xaxis_transform(), ha="right", va="top")
    axes.margins(y=0.15)  # room for the labels of lengths
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="tokens before", ylabel="loss on held-out text, nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)


def print_table(output: Path) -> None:
    """Print OUTPUT/results.json as a table."""
    results = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    table = Table(box=box.MARKDOWN)
    table.add_column("tokens before", justify="right")
    for name in results["loss"]:
        table.add_column(name, justify="right")
    for (first, last), *losses in zip(results["tokens before"], *results["loss"].values(), strict=True):
        table.add_row(f"{first:,} to {last:,}", *(f"{loss:.3f}" for loss in losses))
    Console(width=120).print(table)

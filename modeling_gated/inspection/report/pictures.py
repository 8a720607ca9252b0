"""The pictures of a report, each with what there is to see in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from modeling_gated.inspection.meters.gate_meters import main_gates
from modeling_gated.inspection.numbers import mean_of

from .report import ModelReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


_COLOURS = ("#2f6db5", "#d9772b", "#3a9a5b", "#8c5fb0", "#b5413f", "#6f6f6f")
Reports = Sequence[ModelReport]


@dataclass(frozen=True)
class Picture:
    """A picture of several models' reports: `draw` gives a figure, or None if none of them has what it shows."""

    name: str
    title: str
    look_for: str
    draw: "Callable[[Reports], Figure | None]"


def _heat(value: Callable[[ModelReport], Any], label: str, highest: float | None = None) -> Any:
    """Return layers x heads, one panel per model, all in the same colours."""

    def draw(reports: Reports) -> "Figure | None":
        from matplotlib.figure import Figure

        shown = [(report, _matrix(value(report))) for report in reports]
        shown = [
            (report, matrix) for report, matrix in shown if not all(math.isnan(number) for number in _flat(matrix))
        ]
        if not shown:
            return None
        most = highest or max(number for _, matrix in shown for number in _flat(matrix) if not math.isnan(number))
        columns = min(2, len(shown))
        rows = math.ceil(len(shown) / columns)
        height = max(2.2, min(5.0, 0.14 * max(len(matrix[0]) for _, matrix in shown) + 1.2))
        figure = Figure(figsize=(11.0, rows * height), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip_longest(panels.flat, shown):
            if panel is None:
                axes.set_axis_off()
                continue
            report, matrix = panel
            picture = axes.imshow(
                list(zip(*matrix, strict=True)), aspect="auto", cmap="viridis", vmin=0, vmax=most, origin="lower"
            )
            axes.set_title(_label(report), fontsize=10)
            axes.set_xlabel("layer")
            axes.set_ylabel("head")
            _whole_numbers(axes.xaxis, axes.yaxis)
        figure.colorbar(picture, ax=list(panels.flat), label=label)
        return figure

    return draw


def _by_layer(value: Callable[[ModelReport], Any], label: str, scale: str = "linear", kind: str = "bars") -> Any:
    """Return layers against one number, models side by side."""

    def draw(reports: Reports) -> "Figure | None":
        shown = [(report, value(report)) for report in reports]
        shown = [(report, numbers) for report, numbers in shown if any(number is not None for number in numbers)]
        if not shown:
            return None
        figure, axes = _single(label)
        for number, (report, values) in enumerate(shown):
            heights = [math.nan if height is None else height for height in values]
            colour = _COLOURS[number % len(_COLOURS)]
            if kind == "bars":
                width = 0.84 / len(shown)
                places = [layer - 0.42 + width * (number + 0.5) for layer in range(len(heights))]
                axes.bar(places, heights, width, color=colour, label=_label(report))
            else:  # ever thinner, so that lines that lie on one another are all seen
                size = 4.5 / (number + 1)
                axes.plot(heights, color=colour, label=_label(report), linewidth=size, marker="o", markersize=2 + size)
        axes.set_yscale(scale)
        axes.set_xlabel("layer")
        _whole_numbers(axes.xaxis)
        axes.legend(fontsize=9)
        return figure

    return draw


def _histograms(reports: Reports) -> "Figure | None":
    shown = [(report, position, gates) for report in reports for position, gates in report.gates.items()]
    if not shown:
        return None
    figure, axes = _single("share of all gates")
    for number, (report, position, gates) in enumerate(shown):
        counts = [sum(bin_counts) for bin_counts in zip(*gates["histogram"], strict=True)]
        shares = [count / sum(counts) for count in counts]
        label = f"{_label(report)}, {position}"
        axes.stairs(shares, gates["edges"], color=_COLOURS[number % len(_COLOURS)], label=label, linewidth=2)
    axes.set_xlabel("gate score")
    axes.legend(fontsize=9)
    return figure


def _first_and_others(reports: Reports) -> "Figure | None":
    shown = [(report, main_gates(report.gates)) for report in reports if main_gates(report.gates)]
    if not shown:
        return None
    figure, axes = _single("gate score")
    for number, (report, gates) in enumerate(shown):
        for kind, name, style in (("first_token", "first token", "--"), ("other_tokens", "all others", "-")):
            means = [math.nan if (mean := mean_of(layer)) is None else mean for layer in gates[kind]]
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(
                means, style, color=colour, label=f"{_label(report)}, {name}", linewidth=2, marker="o", markersize=3
            )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("layer")
    _whole_numbers(axes.xaxis)
    axes.legend(fontsize=9)
    return figure


def _interventions(reports: Reports) -> "Figure | None":
    names = list(dict.fromkeys(change.name for report in reports for change in report.interventions))
    if not names:
        return None
    figure, axes = _single("")
    figure.set_figheight(1.2 + 0.32 * len(names) * len(reports))
    height = 0.84 / len(reports)
    for number, report in enumerate(reports):
        changes = {change.name: change for change in report.interventions}
        for row, name in enumerate(names):
            if name not in changes:
                continue
            place = row - 0.42 + height * (number + 0.5)
            difference = changes[name].difference
            label = _label(report) if name == next(iter(changes)) else None
            axes.barh(place, difference or 0, height, color=_COLOURS[number % len(_COLOURS)], label=label)
            said = "not finite" if difference is None else f"{difference:+.3f}"
            axes.annotate(said, (max(difference or 0, 0), place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of the loss, nats per token")
    axes.legend(fontsize=9)
    return figure


def _single(label: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _whole_numbers(*directions: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in directions:
        axis.set_major_locator(MaxNLocator(integer=True))


def _label(report: ModelReport) -> str:
    """Return a model's name as matplotlib writes it: not as mathematics, and not left out for its first letter."""
    name = report.name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _flat(matrix: list[list[float]]) -> list[float]:
    return [number for row in matrix for number in row]


def _matrix(rows: list[list[float | None]]) -> list[list[float]]:
    return [[math.nan if number is None else number for number in row] for row in rows]


def _ratio(report: ModelReport, first: str, other: str) -> list[float | None]:
    norms = report.key_value_norms
    pairs = zip(norms.get(first, ()), norms.get(other, ()), strict=True)
    means = [(mean_of(of_first), mean_of(of_others)) for of_first, of_others in pairs]
    return [of_first / of_others if of_first is not None and of_others else None for of_first, of_others in means]


PICTURES = (
    Picture(
        "first_token_attention",
        "Attention on the first token",
        "Each cell is one attention head: its attention on the first token, whatever that token is, on average over "
        "all later tokens. Bright cells are attention sinks. Models that were trained with gates stay dark (0.05 on "
        "average in the paper, against 0.47 without).",
        _heat(lambda report: report.first_token_attention, "attention probability", highest=1.0),
    ),
    Picture(
        "sink_rate_other",
        "Sinks elsewhere",
        "The same heads: how often another token than the first takes more than 30 % of the attention of all tokens "
        "after it. If the first token's map is dark and this one is bright, the sink has moved.",
        _heat(lambda report: report.sink_rate.get("other", []), "share of windows", highest=1.0),
    ),
    Picture(
        "attention_entropy",
        "Entropy of attention",
        "Dark cells are heads that attend to few tokens, bright cells are heads that attend to many. An attention "
        "sink also makes a head dark.",
        _heat(lambda report: report.attention_entropy, "nats"),
    ),
    Picture(
        "hidden_states",
        "Largest activation of each layer",
        "The largest magnitude in each layer's output, on a logarithmic scale. A massive activation is a step of a "
        "hundred times or more between two layers. One layer writes it for one token, mostly the first, and a layer "
        "near the end removes it. It comes and goes with attention sinks.",
        _by_layer(
            lambda report: [layer["maximum"] for layer in report.hidden_states["layers"]], "max |hidden|", scale="log"
        ),
    ),
    Picture(
        "int8_error",
        "Loss from int8 rounding",
        "Share of a token's hidden state that is lost when a window is rounded to 8 bits with one scale. Near 1, one "
        "massive activation takes the whole range and nothing is left of most tokens. Near 0.01, nothing is lost.",
        _by_layer(lambda report: report.int8_error["per_tensor"], "relative error"),
    ),
    Picture(
        "sink_values",
        "Values of the first token",
        "Length of the first token's value vectors, divided by that of all others. In layers with sinks it is far "
        "below 1: attention to the sink adds next to nothing.",
        _by_layer(lambda report: _ratio(report, "first_value", "other_values"), "ratio of norms", kind="lines"),
    ),
    Picture(
        "sink_keys",
        "Keys of the first token",
        "Length of the first token's key vectors, divided by that of all others. Sinks often have short keys: heads "
        "find them by their direction.",
        _by_layer(lambda report: _ratio(report, "first_key", "other_keys"), "ratio of norms", kind="lines"),
    ),
    Picture(
        "effective_rank",
        "Effective rank of the attention output",
        "Number of directions that each head's output uses, after gates, of as many as it has channels. Dark heads "
        "add nearly the same vector to every token.",
        _heat(lambda report: report.effective_rank, "directions"),
    ),
    Picture(
        "gate_scores",
        "Gate scores by head",
        "Mean opening of each head's gate. One colour everywhere means that gates have not been trained. In models "
        "that were trained with gates, most gates are nearly closed (0.12 to 0.17 in the paper).",
        _heat(lambda report: main_gates(report.gates).get("mean", []), "mean gate score", highest=1.0),
    ),
    Picture(
        "gate_histogram",
        "Distribution of gate scores",
        "Two peaks, near 0 and higher up, are gates that choose between tokens. One narrow peak is gates that do not "
        "depend on the token.",
        _histograms,
    ),
    Picture(
        "gate_first_token",
        "Gates of the first token and of the others",
        "A gate that has taken over the sink's work is closed for tokens to which a head has nothing to say.",
        _first_and_others,
    ),
    Picture(
        "interventions",
        "Loss under interventions",
        "Change of the loss when the first token is hidden or gates are forced. Near 0, the model does not use what "
        "was taken away. If the first token is hidden from the start, the second one takes over its work. If it is "
        "hidden only from tokens more than 64 after it (@64), the loss shows how much they need it. Shuffling gates "
        "over tokens costs models whose gates depend on the token. Converted gates that were not trained are open and "
        "the same for all tokens, so opening and shuffling them changes nothing.",
        _interventions,
    ),
)

"""Pictures of evaluations of long contexts."""

from collections.abc import Sequence
from pathlib import Path

from modeling_gated.errors import EvaluationError

from .context import LOSS, ContextEvaluation


_TITLES = {LOSS: "Loss by position", "passkey": "Pass key", "multi_key_needle": "Needle, one of four keys"}
_TITLES["variable_tracking"] = "Variable tracking"
_MARKERS = "osDv^"


def check_plots() -> None:
    """Raise EvaluationError if there is nothing to plot with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EvaluationError("plots need matplotlib: pip install 'modeling-gated[plot]'") from None


def plot_context(evaluations: Sequence[ContextEvaluation], path: Path) -> None:
    """
    Draw length against loss and against each task's score, one line per model, and save it as an image.

    Lengths for which a model was not made are drawn hollow.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(score.task for evaluation in evaluations for score in evaluation.scores))
    panels = ([LOSS] if any(evaluation.losses for evaluation in evaluations) else []) + tasks
    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, evaluation in enumerate(evaluations):
            if panel == LOSS:
                points = [(bucket.end, bucket.loss) for bucket in evaluation.losses]
            else:
                points = [(score.length, score.score) for score in evaluation.scores if score.task == panel]
            lengths, values = zip(*points, strict=True)
            # Ever thinner, so that lines that lie on one another are all seen.
            style = {
                "marker": _MARKERS[number % len(_MARKERS)],
                "linewidth": 4 / (number + 1),
                "markersize": max(9 - number, 3),
            }
            (line,) = axes.plot(lengths, values, label=evaluation.name, **style)
            hollow = [(length, value) for length, value in points if length in evaluation.beyond]
            if hollow:
                style |= {"linestyle": "none", "markerfacecolor": "white", "color": line.get_color()}
                axes.plot(*zip(*hollow, strict=True), zorder=3, **style)
        axes.set_xscale("log", base=2)
        ticks = sorted({length for evaluation in evaluations for length in evaluation.lengths})
        axes.set_xticks(ticks, [f"{length:,}" for length in ticks], rotation=45)
        axes.minorticks_off()
        axes.set_xlabel("position, up to" if panel == LOSS else "length of the prompt, in tokens")
        axes.set_ylabel("mean loss, in nats per token" if panel == LOSS else "score")
        if panel != LOSS:
            axes.set_ylim(-0.05, 1.05)
        axes.set_title(_TITLES[panel])
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    note = ["hollow: beyond max_position_embeddings"] if any(evaluation.beyond for evaluation in evaluations) else []
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), title=" ".join(note) or None)
    figure.savefig(path, dpi=120)

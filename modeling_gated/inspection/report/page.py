"""What a report is written to: JSON, one page that needs nothing else, and pictures."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pictures import PICTURES
from .report import FORMAT, ModelReport


if TYPE_CHECKING:
    from matplotlib.figure import Figure


JSON, PAGE, PICTURE_FOLDER = "report.json", "report.html", "pictures"
_LARGEST = 4  # layers per model in the page's table


@dataclass(frozen=True)
class Row:
    """A line of the summary: a number of each model's, and what it is."""

    key: str
    label: str
    explanation: str
    style: str

    def values(self, reports: Sequence[ModelReport]) -> list[str]:
        numbers = [report.loss if self.key == "loss" else report.summary[self.key] for report in reports]
        return ["-" if number is None else self.style.format(number) for number in numbers]


ROWS = (
    Row("loss", "loss", "nats per token of the text", "{:.4f}"),
    Row("first_token_attention", "first-token attention", "F-Attn: mean over queries, heads and layers", "{:.3f}"),
    Row("first_token_attention_maximum", "highest layer", "the layer with most of it", "{:.3f}"),
    Row("sink_rate", "sink rate, first token", "windows and heads where it takes more than 30 %", "{:.3f}"),
    Row("sink_rate_other", "sink rate, any other", "where another token takes as much", "{:.3f}"),
    Row("attention_entropy", "entropy of attention", "nats; low where attention goes to few tokens", "{:.2f}"),
    Row(
        "massive_activation",
        "massive activation",
        "M-Act: the largest |hidden| of a layer, mean over layers",
        "{:,.0f}",
    ),
    Row("hidden_state_maximum", "largest |hidden|", "of all layers", "{:,.0f}"),
    Row("int8_error_per_tensor", "int8 error", "share of a hidden state lost, one scale for a window", "{:.3f}"),
    Row("effective_rank", "effective rank", "directions that a head's output uses", "{:.1f}"),
    Row("gate_score", "gate score", "mean of the gates' activation, mostly a sigmoid", "{:.3f}"),
    Row("gate_below", "gates below 0.1", "share of them", "{:.3f}"),
    Row("gate_above", "gates above 0.9", "share of them", "{:.3f}"),
)


def rows_of(reports: Sequence[ModelReport]) -> Iterator[tuple[Row, list[str]]]:
    """The summary's lines that have a number for any model."""
    for row in ROWS:
        values = row.values(reports)
        if any(value != "-" for value in values):
            yield row, values


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("modeling-gated", "torch", "transformers")}


def as_json(reports: Sequence[ModelReport]) -> str:
    """The content of report.json; `report.schema.json` describes it."""
    content = {"format": FORMAT, "versions": versions(), "models": [asdict(report) for report in reports]}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_page(reports: Sequence[ModelReport]) -> str:
    """One HTML page with everything in it, that needs no network and runs no script. Needs matplotlib."""
    from jinja2 import Environment

    pictures = [
        {
            "name": picture.name,
            "title": picture.title,
            "look_for": picture.look_for,
            "image": base64.b64encode(_svg(figure)).decode(),
        }
        for picture in PICTURES
        if (figure := picture.draw(reports)) is not None
    ]
    source = files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    rows = [{"label": row.label, "explanation": row.explanation, "numbers": values} for row, values in rows_of(reports)]
    return template.render(reports=reports, pictures=pictures, rows=rows, versions=versions(), largest=_largest)


def write_pictures(reports: Sequence[ModelReport], folder: Path) -> list[Path]:
    """Each picture as a PNG. Needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_pictures(folder)
    written = []
    for picture in PICTURES:
        if (figure := picture.draw(reports)) is not None:
            written.append(folder / f"{picture.name}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def remove_pictures(folder: Path) -> None:
    """Those of an earlier report."""
    for picture in PICTURES:
        (folder / f"{picture.name}.png").unlink(missing_ok=True)


def _svg(figure: "Figure") -> bytes:
    from matplotlib import rc_context

    image = io.BytesIO()
    # The same bytes for the same numbers.
    with rc_context({"svg.hashsalt": "modeling-gated"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()


def _largest(report: ModelReport) -> list[dict[str, Any]]:
    """The layers with the largest activations, in their order."""
    layers = list(enumerate(report.hidden_states["layers"]))
    chosen = sorted(layers, key=lambda numbered: -numbered[1]["maximum"])[:_LARGEST]
    return [
        {"number": number, "median": layer["median"], "top": layer["top"][0]}
        for number, layer in sorted(chosen, key=lambda numbered: numbered[0])
    ]

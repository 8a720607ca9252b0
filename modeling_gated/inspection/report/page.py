"""Files of a report: JSON, one page that needs nothing else, and pictures."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeling_gated.inspection.watching.meter import SummaryRow

from .pictures import PICTURES
from .report import FORMAT, ModelReport


if TYPE_CHECKING:
    from matplotlib.figure import Figure


JSON, PAGE, PICTURE_FOLDER = "report.json", "report.html", "pictures"
_LARGEST = 4  # layers per model in the page's table


def rows_of(reports: Sequence[ModelReport]) -> Iterator[tuple[SummaryRow, list[str]]]:
    """Yield the summary's lines that have a number for any model, each with its number of every model."""
    of_meters = dict.fromkeys(row for report in reports for row in report.summary_rows)
    for row in (SummaryRow("loss", "loss", "nats per token of the text", "{:.4f}"), *of_meters):
        numbers = [{"loss": report.loss, **report.summary}.get(row.key) for report in reports]
        if any(number is not None for number in numbers):
            yield row, ["-" if number is None else row.style.format(number) for number in numbers]


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("modeling-gated", "torch", "transformers")}


def as_json(reports: Sequence[ModelReport]) -> str:
    """Return the content of report.json; `report.schema.json` describes it."""
    content = {"format": FORMAT, "versions": versions(), "models": [report.as_dict() for report in reports]}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_page(reports: Sequence[ModelReport]) -> str:
    """Return one HTML page with everything in it, without scripts or links to the network. Needs matplotlib."""
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
    """Write each picture as a PNG and return the paths. Needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_pictures(folder)
    written = []
    for picture in PICTURES:
        if (figure := picture.draw(reports)) is not None:
            written.append(folder / f"{picture.name}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def remove_pictures(folder: Path) -> None:
    """Remove the pictures of an earlier report."""
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
    """Return the layers with the largest activations, in their order."""
    layers = list(enumerate(report.hidden_states["layers"]))
    chosen = sorted(layers, key=lambda numbered: -numbered[1]["maximum"])[:_LARGEST]
    return [
        {"number": number, "median": layer["median"], "top": layer["top"][0]}
        for number, layer in sorted(chosen, key=lambda numbered: numbered[0])
    ]

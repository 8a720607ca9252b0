"""The example that leaves out steps of absorbing sinks, on a tiny model."""

import json
import re
from pathlib import Path

import pytest

from examples.recipes import absorption_controls
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.sink_model import sink_model


SMALL = {"sample_tokens": 0, "calibration_tokens": 1024, "measured_windows": 2}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    model = sink_model()
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder / "source")
    byte_tokenizer().save_pretrained(folder / "source")
    absorption_controls.main(
        str(folder / "source"),
        output=folder / "made",
        budgets="2048,4096",
        variants="absorbed,key edit without gates,self-distilled",
        **SMALL,
    )
    return folder / "made"


def test_it_makes_every_variant_once(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All budgets with all steps, the first with those left out; what is complete is not made again."""
    names = {
        "absorbed-2048-seed0",
        "absorbed-4096-seed0",
        "key-edit-without-gates-2048-seed0",
        "self-distilled-2048-seed0",
    }
    assert {path.parent.name for path in output.glob("*/config.json")} == names
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/absorption.json")}
    absorption_controls.main(str(output.parent / "source"), output=output, budgets="2048", variants="absorbed", **SMALL)
    with pytest.raises(SystemExit, match=r"absorbed-2048-seed0: sample_tokens must be 10, got 0; choose another"):
        absorption_controls.main(
            str(output.parent / "source"), output=output, budgets="2048", **SMALL | {"sample_tokens": 10}
        )
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/absorption.json")} == before
    assert (output / "frontier.png").stat().st_size > 10_000
    rows = {
        line.split("|")[1].strip(): " ".join(line.split())
        for line in capsys.readouterr().out.splitlines()
        if re.search(r"seed0 +\|", line)
    }
    assert set(rows) == names
    report = json.loads((output / "absorbed-4096-seed0" / "absorption.json").read_text(encoding="utf-8"))
    ratios = [comparison["perplexity_ratio"] for comparison in report["comparisons"] if comparison["start"] == "plain"]
    assert f"| 4,096 | {report['products']} | " in rows["absorbed-4096-seed0"]
    assert f"| {100 * (ratios[0] - 1):+.1f} % |" in rows["absorbed-4096-seed0"]


def test_what_is_left_out(output: Path) -> None:
    reports = absorption_controls.read_reports(output)
    gates = {name: sum(any(layer["gated"]) for layer in report["layers"]) for name, report in reports.items()}
    keys = {name: sum(any(layer["keys_edited"]) for layer in report["layers"]) for name, report in reports.items()}
    writers = {name: len(report["writers"]) for name, report in reports.items()}
    assert (gates["absorbed-2048-seed0"], writers["absorbed-2048-seed0"]) == (3, 2)
    assert keys["absorbed-2048-seed0"] > 0
    assert (gates["key-edit-without-gates-2048-seed0"], writers["key-edit-without-gates-2048-seed0"]) == (0, 2)
    assert keys["key-edit-without-gates-2048-seed0"] > 0
    name = "self-distilled-2048-seed0"
    assert (gates[name], keys[name], writers[name]) == (0, 0, 0)
    assert reports[name]["distilled_tokens"] == 2048


def test_a_card_says_what_was_left_out(output: Path) -> None:
    whole = (output / "absorbed-2048-seed0" / "README.md").read_text(encoding="utf-8")
    assert "without attention sinks and massive activations. Attention output gates " in whole
    assert "| settings without a flag | calibration_tokens=1024, refinement_epochs=12, measured_windows=2 |" in whole
    control = (output / "self-distilled-2048-seed0" / "README.md").read_text(encoding="utf-8")
    assert "without attention sinks" not in control
    assert "source, edited as an ablation: steps were left out" in control
    assert "removes_writers=False, edits_keys=False, edits_gates=False, trains_gates=False |" in control


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": "absorbed,all"}, "error: --variants must be among absorbed, .*, got all"),
        ({"budgets": "1e5"}, "error: --budgets must be integers separated by commas, got 1e5"),
        ({"checkpoint": "nowhere/at/all"}, "error: .*nowhere/at/all"),
        ({"calibration_tokens": 10}, "error: calibration_tokens must be at least 512, got 10"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        absorption_controls.main(**{"output": tmp_path / "made"} | options)
    assert "\n" not in str(caught.value)

"""The model card: what it says, what it takes over from the source's, and what a hostile one can do."""

import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_gated.configuration import open_gate
from modeling_gated.conversion import convert_checkpoint


def test_it_says_where_the_model_comes_from_and_how(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "a result | of mine"
    convert_checkpoint(llama, output, granularity="elementwise", gate_init=0.9, place="copy", overwrite=True)
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == "llama"
    assert card.data.library_name == "transformers"
    assert "gated-attention" in card.data.tags
    lines = card.text.partition("| --- | --- |\n")[2].splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines[: lines.index("")])
    assert rows["base model"] == "llama"
    assert rows["revision"] == "not known (a local path)"
    assert rows["gates"] == "elementwise, 3 layers, 15,768 parameters"
    assert (float(rows["gate_init"]), float(rows["gate_scale"])) == (0.9, open_gate(0.9)[1])
    command = shlex.split(rows["command"].strip("`").replace("\\|", "|"))
    assert command == [
        *("gated-llama", "convert", str(llama), str(output)),
        *("--granularity", "elementwise", "--gate-init", "0.9", "--place", "copy", "--overwrite"),
    ]


def test_license_and_language_are_the_source_s(llama: Path, tmp_path: Path) -> None:
    (llama / "README.md").write_bytes(
        b"---\r\nlicense: other\r\nlicense_name: mine\r\nlanguage:\r\n- en\r\n- de\r\ntags:\r\n- x\r\n---\r\n# Hello"
    )
    convert_checkpoint(llama, tmp_path / "gated")
    data = ModelCard.load(tmp_path / "gated" / "README.md").data.to_dict()
    assert (data["license"], data["license_name"], data["language"]) == ("other", "mine", ["en", "de"])
    assert "x" not in data["tags"]


@pytest.mark.parametrize(
    "front",
    [
        "license: [",
        "license: {a: b}",
        "license: 3",
        "license: !!python/object/apply:os.system ['touch ran']",
        "license: " + "x" * 10_000,
        "- a\n- list",
        "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nlanguage: [*c,*c,*c,*c]",
        "[" * 10_000,
        "\x00",
        "license: 'mit\n---\n# injected'",
    ],
)
def test_a_card_that_cannot_be_read_is_no_reason_to_fail(
    llama: Path, tmp_path: Path, front: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (llama / "README.md").write_text(f"---\n{front}\n---\n")
    convert_checkpoint(llama, tmp_path / "gated")
    data = ModelCard.load(tmp_path / "gated" / "README.md").data.to_dict()
    assert data["base_model"] == "llama" and not data.keys() & {"license", "language"}
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "gated"}

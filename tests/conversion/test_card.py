"""The model card: what it says, what it takes over from the source's, and what a hostile one can do."""

import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_gated.configuration import open_gate
from modeling_gated.conversion import convert_checkpoint, extend_checkpoint


def test_it_says_where_the_model_comes_from_and_how(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "a result | of mine"
    convert_checkpoint(llama, output, granularity="elementwise", gate_init=0.9, place="copy", overwrite=True)
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model is None
    assert card.data.library_name == "transformers"
    assert "gated-attention" in card.data.tags
    lines = card.text.partition("| --- | --- |\n")[2].splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines[: lines.index("")])
    assert rows["base model"] == "llama"
    assert rows["revision"] == "unknown (a local path)"
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


def base_model(path: Path) -> object:
    return ModelCard.load(path / "README.md").data.to_dict().get("base_model")


BASE_MODELS: dict[str, tuple[str, object]] = {
    # the source's front matter, and the result's base model, None if there is none
    "an id": ("base_model: owner/name", "owner/name"),
    "an old id": ("base_model: gpt2", "gpt2"),
    "a list": ("base_model:\n- owner/name\n- other/name", ["owner/name", "other/name"]),
    "quantized": ("base_model: owner/name\nbase_model_relation: quantized", "owner/name"),
    "no base model": ("license: mit", None),
    "empty": ("base_model:", None),
    "an empty list": ("base_model: []", None),
    "an absolute path": ("base_model: /home/me/llama", None),
    "a relative path": ("base_model: ./llama", None),
    "too many parts": ("base_model: a/b/c", None),
    "spaces": ("base_model: my model", None),
    "a path in a list": ("base_model:\n- owner/name\n- ./llama", None),
    "a number": ("base_model: 7", None),
    "a mapping": ("base_model: {owner: name}", None),
    "a list of lists": ("base_model: [[owner/name]]", None),
    "long": ("base_model: owner/" + "x" * 300, None),
}


@pytest.mark.parametrize("case", list(BASE_MODELS))
def test_the_base_model_is_that_of_the_source_s_card(case: str, llama: Path, tmp_path: Path) -> None:
    front, expected = BASE_MODELS[case]
    (llama / "README.md").write_text(f"---\n{front}\n---\n# Hello")
    convert_checkpoint(llama, tmp_path / "gated")
    assert base_model(tmp_path / "gated") == expected
    assert "base_model_relation" not in (tmp_path / "gated" / "README.md").read_text()
    extend_checkpoint(tmp_path / "gated", tmp_path / "longer", context={"length": 512})
    assert base_model(tmp_path / "longer") == expected


@pytest.mark.parametrize("name", ["llama", "owner--name", "my llama", "owner.git", "-llama"])
def test_a_local_folder_s_name_is_no_base_model(name: str, llama: Path, tmp_path: Path) -> None:
    llama.rename(tmp_path / name)
    convert_checkpoint(tmp_path / name, tmp_path / "gated")
    card = (tmp_path / "gated" / "README.md").read_text()
    assert base_model(tmp_path / "gated") is None
    assert f"`{name}` with attention output gates" in card and f"| base model | {name} |" in card


@pytest.mark.parametrize(("front", "expected"), [("license: mit", "owner/new"), ("base_model: owner/old", "owner/old")])
def test_an_id_on_the_hub_is_the_base_model_if_the_card_names_none(
    front: str, expected: str, llama: Path, tmp_path: Path
) -> None:
    (llama / "README.md").write_text(f"---\n{front}\n---\n")
    snapshot = tmp_path / "hub" / "models--owner--new" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    llama.rename(snapshot)
    convert_checkpoint(snapshot, tmp_path / "gated")
    assert base_model(tmp_path / "gated") == expected
    assert "[owner/new](https://huggingface.co/owner/new)" in (tmp_path / "gated" / "README.md").read_text()


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
        "base_model: [",
        "base_model: &a [*a]",
        "base_model: !!python/name:os.system",
    ],
)
def test_a_card_that_cannot_be_read_is_no_reason_to_fail(
    llama: Path, tmp_path: Path, front: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (llama / "README.md").write_text(f"---\n{front}\n---\n")
    convert_checkpoint(llama, tmp_path / "gated")
    data = ModelCard.load(tmp_path / "gated" / "README.md").data.to_dict()
    assert not data.keys() & {"base_model", "license", "language"}
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "gated"}

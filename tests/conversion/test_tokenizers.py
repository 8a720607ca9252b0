"""A result tokenizes as its source does, whatever class Transformers picks by the model type; verify sees to it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

from modeling_gated.cli import app
from modeling_gated.conversion import (
    ConversionError,
    convert_checkpoint,
    extend_checkpoint,
    plan_conversion,
    repair_tokenizer,
    ungate_checkpoint,
    verify_checkpoint,
)
from modeling_gated.conversion.manifest import read_manifest
from modeling_gated.conversion.tokenizers import compare_tokenizers
from tests.helpers.checkpoints import contents
from tests.helpers.processes import run_isolated
from tests.helpers.source_models import SIZES
from tests.helpers.tokenizer_files import CUSTOM_CODE, write_tokenizer


FAMILIES = [
    name
    for name in ("llama", "mistral", "ministral", "qwen2", "qwen3", "cwm", "internlm3", "iquestcoder", "seed_oss")
    if name in CONFIG_MAPPING
]
CODE = "def f(x):\n    if x:\n        return  12345\n"
TEXTS = (
    CODE,
    "  <s>[INST] Hi [/INST] </s><|im_start|>user\n",
    "日本語 नमस्ते é",
    "DON'T don't\n\n\n x",
    " 3.1415926 ",
    "",
)
# tokenizer_config.json; None: there is none. "legacy: false" is what Mistral's chat models say.
CONFIGS: dict[str, dict[str, Any] | None] = {
    "no config": None,
    "no class": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Llama": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "add_bos_token": True},
    "Llama, fast": {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "model_max_length": 128},
    "any fast one": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "pad_token": "</s>"},
    "an unknown one": {"tokenizer_class": "UnknownTokenizer", "bos_token": "<s>", "padding_side": "left"},
    "Llama, with code": {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "auto_map": {"AutoTokenizer": ["tokenization_custom.CustomTokenizer", None]},
    },
    "with code": {
        "tokenizer_class": "CustomTokenizer",
        "bos_token": "<s>",
        "auto_map": {"AutoTokenizer": [None, "tokenization_custom.CustomTokenizer"]},
    },
}
KINDS = ("byte-level", "metaspace", "vocabulary and merges")


def source(directory: Path, family: str, kind: str, config: dict[str, Any] | None) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES | {"vocab_size": 700}, head_dim=8))
    model.save_pretrained(directory)
    write_tokenizer(directory, kind)
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        if "auto_map" in config:
            shutil.copy(CUSTOM_CODE, directory)
    return directory


def tokenizer(path: Path, **options: Any) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(path, **{"trust_remote_code": False} | options)
    except ValueError:
        return None


def behaviour(loaded: PreTrainedTokenizerBase) -> list[Any]:
    ids = [loaded(text).input_ids for text in TEXTS]
    special = [loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.pad_token, loaded.padding_side]
    return [ids, [loaded.decode(each) for each in ids], special, loaded.model_max_length, loaded.get_vocab()]


@pytest.mark.fast(only="[mistral-")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_tokenizes_as_its_source(tmp_path: Path, family: str, kind: str) -> None:
    path = source(tmp_path / "source", family, kind, None)
    for config in CONFIGS.values():
        file = path / "tokenizer_config.json"
        file.unlink(missing_ok=True)
        shutil.copy(CUSTOM_CODE, path)
        if config is not None:
            file.write_text(json.dumps(config))
        expected = tokenizer(path)
        convert_checkpoint(path, tmp_path / "gated", overwrite=True)
        actual = tokenizer(tmp_path / "gated")
        if expected is None:  # it needs trust_remote_code, or files that are not there: nothing is changed
            assert actual is None or "auto_map" not in (config or {})
            assert config is None or (tmp_path / "gated" / file.name).read_bytes() == file.read_bytes()
            continue
        assert actual is not None
        assert behaviour(actual) == behaviour(expected)
        # A gated model without this package is loaded with trust_remote_code, which must not change the tokenizer.
        trusting = tokenizer(tmp_path / "gated", trust_remote_code=True)
        assert trusting is not None and behaviour(trusting) == behaviour(expected)
        before = contents(path)
        ungate_checkpoint(tmp_path / "gated", tmp_path / "back", overwrite=True)
        assert contents(tmp_path / "back") == before


def test_the_carried_code_gives_the_same_tokenizer_without_this_package(tmp_path: Path) -> None:
    for family, kind, name in [("mistral", "metaspace", "Llama"), ("qwen2", "vocabulary and merges", "no class")]:
        path = source(tmp_path / family / "source", family, kind, CONFIGS[name])
        gated = tmp_path / family / "gated"
        convert_checkpoint(path, gated)
        done = run_isolated("tokenize_texts.py", gated, json.dumps(TEXTS))
        assert done.returncode == 0, done.stderr
        expected = tokenizer(path)
        assert expected is not None
        # Transformers asks before it reads config.json; nobody answers, and the tokenizer is found without it.
        lines = [line[line.index("[[") :] for line in done.stdout.splitlines() if "[[" in line]
        assert len(lines) == 2, done.stdout
        for line in lines:
            assert json.loads(line) == behaviour(expected)[0]


def test_the_class_is_named_and_the_source_config_kept(tmp_path: Path) -> None:
    """Mistral's own case: its class by the model type, whatever the file says."""
    path = source(tmp_path / "source", "mistral", "metaspace", CONFIGS["Llama"])
    assert type(tokenizer(path)).__name__ == "TokenizersBackend"
    convert_checkpoint(path, tmp_path / "gated")
    written = json.loads((tmp_path / "gated" / "tokenizer_config.json").read_text())
    assert written == (CONFIGS["Llama"] or {}) | {"tokenizer_class": "TokenizersBackend"}
    manifest = read_manifest(tmp_path / "gated")
    assert manifest is not None
    assert json.loads(manifest.replaced["tokenizer_config.json"]) == CONFIGS["Llama"]
    assert (tmp_path / "gated" / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    files = {name: origin for name, _, origin in plan_conversion(path, tmp_path / "other").files()}
    assert files["tokenizer_config.json"] == "new, so that the tokenizer is the source's"


def test_a_fix_that_depends_on_the_model_type_is_kept(tmp_path: Path) -> None:
    """Transformers mends the regex of Mistral's large vocabularies, by the model type and version in config.json."""
    path = source(tmp_path / "source", "mistral", "byte-level", {"bos_token": "<s>", "fix_mistral_regex": True})
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    size = len(content["model"]["vocab"])
    content["model"]["vocab"] |= {f"unused {number}": size + number for number in range(100_001)}
    file.write_text(json.dumps(content))
    config = json.loads((path / "config.json").read_text()) | {"transformers_version": "4.57.3"}
    (path / "config.json").write_text(json.dumps(config))
    expected = tokenizer(path)
    convert_checkpoint(path, tmp_path / "gated")
    actual = tokenizer(tmp_path / "gated")
    assert expected is not None and actual is not None
    assert actual("12345").input_ids == expected("12345").input_ids
    assert behaviour(actual) == behaviour(expected)
    assert file.read_bytes() != (tmp_path / "gated" / "tokenizer.json").read_bytes()  # the class alone is not enough
    ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(path)


def converted_earlier(tmp_path: Path, family: str = "mistral", kind: str = "metaspace", name: str = "Llama") -> Path:
    """A conversion as earlier versions made it, with the source's tokenizer files as they are."""
    path = source(tmp_path / "source", family, kind, CONFIGS[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_gated.conversion.plan.tokenizer_changes", lambda *_: ({}, None))
        convert_checkpoint(path, tmp_path / "gated")
    return path


def test_verify_fails_where_the_tokenizer_differs_and_repair_mends_it(tmp_path: Path) -> None:
    path = converted_earlier(tmp_path)
    verification = verify_checkpoint(path, tmp_path / "gated", tokens=20)
    assert not verification.passed and verification.verdict == "different" and verification.max_difference == 0
    assert any("has other ids" in line for line in verification.tokenizer.differences)
    assert "gated-llama repair-tokenizer" in verification.summary()["tokenizer"]
    weights = {name: digest for name, digest in contents(tmp_path / "gated").items() if "safetensors" in name}

    done = CliRunner().invoke(app, ["repair-tokenizer", str(tmp_path / "gated")])
    assert done.exit_code == 0 and "tokenizer_config.json" in done.stdout
    verification = verify_checkpoint(path, tmp_path / "gated", tokens=20)
    assert verification.passed and verification.tokenizer.texts > 20
    assert verification.summary()["tokenizer"].startswith("the source's: equal ids of")
    assert {name: digest for name, digest in contents(tmp_path / "gated").items() if name in weights} == weights
    assert repair_tokenizer(tmp_path / "gated").files == ()
    ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(path)


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        ("qwen2", "vocabulary and merges", "no config"),
        ("qwen3", "byte-level", "no class"),
        *([("internlm3", "metaspace", "with code")] if "internlm3" in FAMILIES else []),
        ("llama", "metaspace", "no class"),
    ],
)
def test_repair_of_others_and_of_what_was_extended(tmp_path: Path, family: str, kind: str, name: str) -> None:
    path = converted_earlier(tmp_path, family, kind, name)
    extend_checkpoint(tmp_path / "gated", tmp_path / "extended", context={"length": 1024})
    for directory in (tmp_path / "gated", tmp_path / "extended"):
        repair_tokenizer(directory)
        actual, expected = tokenizer(directory), tokenizer(path)
        assert actual is not None and expected is not None and behaviour(actual) == behaviour(expected)
    assert verify_checkpoint(path, tmp_path / "extended", tokens=20).passed
    ungate_checkpoint(tmp_path / "extended", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(path)


def test_repair_without_a_manifest_needs_the_source(tmp_path: Path) -> None:
    path = converted_earlier(tmp_path)
    (tmp_path / "gated" / "gated_llama_manifest.json").unlink()
    with pytest.raises(ConversionError, match="name the source as well: gated-llama repair-tokenizer"):
        repair_tokenizer(tmp_path / "gated")
    done = CliRunner().invoke(app, ["repair-tokenizer", str(tmp_path / "gated"), "--source", str(path)])
    assert done.exit_code == 0
    assert verify_checkpoint(path, tmp_path / "gated", tokens=20).passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no such directory"),
        (["source"], "model_type must be gated_llama, got 'mistral'"),
        (["gated", "--source", "missing/too"], "missing/too"),
    ],
)
def test_what_cannot_be_repaired_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    converted_earlier(tmp_path)
    before = contents(tmp_path)
    paths = [argument if argument.startswith("--") else str(tmp_path / argument) for argument in arguments]
    done = CliRunner().invoke(app, ["repair-tokenizer", *paths])
    assert done.exit_code == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert contents(tmp_path) == before


CHANGES: dict[str, dict[str, Any]] = {
    "a special token": {"eos_token": "<|im_end|>"},
    "the side of padding": {"padding_side": "left"},
    "the chat template": {"chat_template": "{% for m in messages %}{{ m['content'] }}!{% endfor %}"},
    "the longest input": {"model_max_length": 17},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_verify_sees_settings_that_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = source(tmp_path / "source", "llama", "byte-level", CONFIGS["any fast one"])
    convert_checkpoint(path, tmp_path / "gated")
    file = tmp_path / "gated" / "tokenizer_config.json"
    assert verify_checkpoint(path, tmp_path / "gated", tokens=20).passed
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    verification = verify_checkpoint(path, tmp_path / "gated", tokens=20)
    assert not verification.passed and verification.tokenizer.differences


def test_verify_sees_a_normalizer_that_changes(tmp_path: Path) -> None:
    path = source(tmp_path / "source", "llama", "byte-level", CONFIGS["any fast one"])
    convert_checkpoint(path, tmp_path / "gated")
    file = tmp_path / "gated" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFKC"}}))
    verification = verify_checkpoint(path, tmp_path / "gated", tokens=20)
    assert not verification.passed and any("has other ids" in line for line in verification.tokenizer.differences)
    file.write_text("{")
    verification = verify_checkpoint(path, tmp_path / "gated", tokens=20)
    assert not verification.passed and "must be a JSON file" in verification.tokenizer.differences[0]


def test_verify_says_why_it_compared_no_tokenizers(tmp_path: Path) -> None:
    path = source(tmp_path / "source", "llama", "byte-level", CONFIGS["with code"])
    convert_checkpoint(path, tmp_path / "gated")
    verification = verify_checkpoint(path, tmp_path / "gated", tokens=20)
    assert verification.passed and verification.summary()["tokenizer"].startswith("not compared:")


@pytest.mark.parametrize(("kind", "name"), [("byte-level", "with code"), ("vocabulary and merges", "no class")])
def test_convert_says_why_it_compared_no_tokenizers(tmp_path: Path, kind: str, name: str) -> None:
    path = source(tmp_path / "source", "llama", kind, CONFIGS[name])
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "gated")])
    assert done.exit_code == 0
    assert "note: the tokenizer files are copied but not compared:" in done.stderr
    for file in path.iterdir():
        file.unlink() if "token" in file.name or file.suffix == ".txt" or file.name == "vocab.json" else None
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "without")])
    assert done.exit_code == 0 and "tokenizer" not in done.stderr


def test_a_tokenizer_without_added_vocabulary_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mistral's own backend, which needs mistral-common, has no get_added_vocab."""
    path = source(tmp_path / "source", "mistral", "byte-level", CONFIGS["no class"])
    monkeypatch.delattr(PreTrainedTokenizerFast, "get_added_vocab")
    assert compare_tokenizers(path, path, None).differences == ()


def test_a_large_tokenizer_config_is_converted(tmp_path: Path) -> None:
    """Models of speech have thousands of added tokens in it."""
    path = source(tmp_path / "source", "llama", "byte-level", None)
    added = {
        str(700 + number): {"content": f"<custom_token_{number}>", "special": True, "lstrip": False, "rstrip": False}
        for number in range(12_000)
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    assert (path / "tokenizer_config.json").stat().st_size > 1_000_000
    convert_checkpoint(path, tmp_path / "gated")
    expected, actual = tokenizer(path), tokenizer(tmp_path / "gated")
    assert expected is not None and actual is not None and behaviour(actual) == behaviour(expected)


@pytest.mark.parametrize("template", ["{{ strftime_now('%f') }}", "{{ raise_exception('no') }}", "{% syntax"])
def test_a_template_that_changes_or_fails_is_no_difference(tmp_path: Path, template: str) -> None:
    path = source(tmp_path / "source", "mistral", "metaspace", {"chat_template": template, "bos_token": "<s>"})
    convert_checkpoint(path, tmp_path / "gated")
    assert verify_checkpoint(path, tmp_path / "gated", tokens=20).passed


def test_convert_renders_no_template(tmp_path: Path) -> None:
    """One may never end; equal templates and tokenizers give equal ids."""
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    path = source(tmp_path / "source", "mistral", "metaspace", {"chat_template": template, "bos_token": "<s>"})
    convert_checkpoint(path, tmp_path / "gated")


def test_repair_of_a_tokenizer_that_was_saved_with_the_wrong_class(tmp_path: Path) -> None:
    path = converted_earlier(tmp_path)
    wrong = tokenizer(tmp_path / "gated")
    assert wrong is not None
    wrong.save_pretrained(tmp_path / "gated")  # as a trainer does: with special tokens that the source does not have
    (tmp_path / "gated" / "gated_llama_manifest.json").unlink()
    with pytest.raises(ConversionError, match=r"would still differ .*; copy the source's tokenizer files into"):
        repair_tokenizer(tmp_path / "gated", path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gated" / name).write_bytes((path / name).read_bytes())
    assert repair_tokenizer(tmp_path / "gated", path).files == ("tokenizer_config.json",)
    actual, expected = tokenizer(tmp_path / "gated"), tokenizer(path)
    assert actual is not None and expected is not None and behaviour(actual) == behaviour(expected)


def test_repair_keeps_what_is_the_checkpoint_s_own(tmp_path: Path) -> None:
    path = converted_earlier(tmp_path)
    file = tmp_path / "gated" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages }}"}))
    before = contents(tmp_path / "gated")
    with pytest.raises(ConversionError, match="would still differ from the source's: chat_template is"):
        repair_tokenizer(tmp_path / "gated", path)
    assert contents(tmp_path / "gated") == before
    repair_tokenizer(tmp_path / "gated")  # by the manifest, only the class is the source's
    actual, expected = tokenizer(tmp_path / "gated"), tokenizer(path)
    assert actual is not None and expected is not None
    assert actual.chat_template == "{{ messages }}" and behaviour(actual) == behaviour(expected)


def test_code_is_left_out_where_the_source_loads_without(tmp_path: Path) -> None:
    """With trust_remote_code=True, which the model needs without this package, the code would run."""
    path = source(tmp_path / "source", "llama", "byte-level", CONFIGS["Llama, with code"])
    convert_checkpoint(path, tmp_path / "gated")
    assert "auto_map" not in json.loads((tmp_path / "gated" / "tokenizer_config.json").read_text())
    actual, expected = tokenizer(tmp_path / "gated", trust_remote_code=True), tokenizer(path)
    assert actual is not None and expected is not None and behaviour(actual) == behaviour(expected)

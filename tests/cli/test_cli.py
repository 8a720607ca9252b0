"""The gated-llama command: fast help, one clear line for what a user can mend, nothing left behind."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from modeling_gated.cli import app
from tests.helpers.processes import PROGRAMS, run_program


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.fast
def test_help_needs_neither_torch_nor_transformers() -> None:
    command = Path(sys.executable).with_name("gated-llama")
    subcommands = ("convert", "verify", "ungate", "absorb")
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in subcommands)):
        result = run_program("check_imports.py", command, *arguments)  # the installed script, which is Python
        assert result.returncode == 0, result.stderr
        assert "gated" in result.stdout


@pytest.mark.fast
@pytest.mark.parametrize("command", [command.name for command in get_command(app).commands.values()])  # type: ignore[attr-defined]
def test_help_has_an_example_and_fits_into_80_columns(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert f"Example: gated-llama {command} " in result.stdout
    assert "…" not in result.stdout  # an option or a default that is cut off
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_script_of_the_command_s_name_is_not_taken_for_it(tmp_path: Path) -> None:
    script = tmp_path / "gated-llama.py"
    shutil.copy(PROGRAMS / "use_package.py", script)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_command_converts(llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    """In a process of its own, where the package has not registered anything yet."""
    command = [Path(sys.executable).with_name("gated-llama"), "convert", llama, tmp_path / "gated"]
    result = subprocess.run(
        [*command, "--granularity", "elementwise", "--gate-init", "0.9"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    added = gated.num_parameters() - AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    assert f"{added:,}" in result.stdout
    assert str(tmp_path / "gated") in result.stdout
    assert gated.config.gate_granularity == "elementwise"
    assert gated.config.gate_init == 0.9
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path / 'gated'}: already exists; --overwrite replaces it\n"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def weight_map(path: Path, change: Callable[[dict], object]) -> None:
    edit_json(path / "model.safetensors.index.json", lambda index: change(index["weight_map"]))


def config(path: Path, **fields: object) -> None:
    edit_json(path / "config.json", lambda config: config.update(fields))


def first_shard(path: Path) -> Path:
    return min(path.glob("*.safetensors"))


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def pickles_only(path: Path) -> None:
    for shard in path.glob("model*.safetensors*"):
        shard.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02")


def oversized_header(path: Path) -> None:
    first_shard(path).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def duplicate(path: Path) -> None:
    last = max(path.glob("*.safetensors"))
    tensors = load_file(last) | {EMBEDDINGS: load_file(first_shard(path))[EMBEDDINGS] + 1}
    save_file(tensors, last, metadata={"format": "pt"})


EMBEDDINGS = "model.embed_tokens.weight"
BAD_SOURCES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "pickle only": (pickles_only, ["pytorch_model.bin", "safetensors", "save_pretrained"]),
    "no weights": (lambda path: [shard.unlink() for shard in path.glob("model*")], ["model.safetensors"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["config.json", "no such file"]),
    "config not JSON": (lambda path: (path / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "config too deep": (lambda path: (path / "config.json").write_text("[" * 10**5), ["config.json", "not valid JSON"]),
    "config a list": (lambda path: (path / "config.json").write_text("[]"), ["config.json", "not a JSON object"]),
    "unsupported": (lambda path: config(path, model_type="gpt2"), ["config.json", "'gpt2'", "qwen3"]),
    "no model_type": (lambda path: edit_json(path / "config.json", lambda c: c.pop("model_type")), ["None"]),
    "model_type a list": (lambda path: config(path, model_type=["llama"]), ["config.json", "['llama']"]),
    "already gated": (lambda path: config(path, model_type="gated_llama"), ["config.json", "already gated"]),
    "layers without positions": (lambda path: config(path, model_type="smollm3"), ["config.json", "'smollm3'"]),
    "unknown quantization": (
        lambda path: config(path, quantization_config={"quant_method": "quanto"}),
        ["config.json", "quant_method='quanto'"],
    ),
    "quantization a word": (lambda path: config(path, quantization_config="int8"), ["quantization_config='int8'"]),
    "no heads": (
        lambda path: config(path, num_attention_heads=0),
        ["config.json", "num_attention_heads must be at least 1", "got 0"],
    ),
    "dtype": (lambda path: config(path, dtype="blah"), ["config.json", "dtype='blah'", "bfloat16"]),
    "adapter": (lambda path: (path / "adapter_config.json").write_text("{}"), ["adapter_config.json"]),
    "wrong type": (lambda path: config(path, hidden_size="72"), ["config.json", "hidden_size", "'72'"]),
    "heads don't divide": (lambda path: config(path, num_key_value_heads=4), ["config.json", "num_key_value_heads=4"]),
    "wrong shape": (lambda path: config(path, vocab_size=97), [EMBEDDINGS, "[96, 72]", "[97, 72]"]),
    "layers missing": (lambda path: config(path, num_hidden_layers=4), ["model.layers.3."]),
    "truncated shard": (lambda path: truncate(first_shard(path)), ["model-00001-of-", "not a complete safetensors"]),
    "empty shard": (lambda path: first_shard(path).write_bytes(b""), ["model-00001-of-", "not a complete safetensors"]),
    "oversized header": (oversized_header, ["model-00001-of-", "not a complete safetensors"]),
    "missing shard": (lambda path: first_shard(path).unlink(), ["model-00001-of-", "no such file"]),
    "index not JSON": (lambda path: (path / "model.safetensors.index.json").write_text("x"), ["index.json"]),
    "index without map": (lambda path: weight_map(path, dict.clear), ["index.json", "weight_map"]),
    "index names a missing file": (
        lambda path: weight_map(path, lambda found: found.update({EMBEDDINGS: "model-00099.safetensors"})),
        ["model-00099.safetensors", "no such file"],
    ),
    "index names a parent": (
        lambda path: weight_map(path, lambda found: found.update({EMBEDDINGS: "../secret.safetensors"})),
        ["index.json", EMBEDDINGS, "'../secret.safetensors'"],
    ),
    "index names an absolute path": (
        lambda path: weight_map(path, lambda found: found.update({EMBEDDINGS: "/etc/model.safetensors"})),
        ["index.json", EMBEDDINGS, "'/etc/model.safetensors'"],
    ),
    "index names a number": (
        lambda path: weight_map(path, lambda found: found.update({EMBEDDINGS: 3})),
        ["index.json"],
    ),
    "tensor in two shards": (duplicate, [EMBEDDINGS, "got different values", "save_pretrained"]),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", list(BAD_SOURCES))
def test_a_bad_source_gets_one_clear_line(sharded: Path, tmp_path: Path, case: str) -> None:
    spoil, words = BAD_SOURCES[case]
    (tmp_path / "secret.safetensors").write_bytes(first_shard(sharded).read_bytes())
    spoil(sharded)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = run("convert", sharded, tmp_path / "new" / "gated")
    assert code == 1
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere", "{tmp}/out"], ["{tmp}/nowhere", "no such file or directory"]),
        (
            ["{llama}", "{tmp}/out", "--gate-init", "1.5"],
            ["--gate-init must be between 0 and 1, both excluded, got 1.5"],
        ),
        (
            ["{llama}", "{tmp}/out", "--gate-init", "nan"],
            ["--gate-init must be between 0 and 1, both excluded, got nan"],
        ),
        (["{llama}", "{tmp}/out", "--dtype", "float16"], ["--dtype", "not a GGUF file"]),
        (["{llama}", "{llama}/tokenizer_config.json/out"], ["{llama}/tokenizer_config.json"]),
        (["{tmp}", "{tmp}/../out"], ["give its path: {tmp}/bad.gguf"]),
        (
            ["{tmp}/cut.gguf", "{tmp}/out", "--gate-init", "2"],
            ["--gate-init must be between 0 and 1, both excluded, got 2.0"],
        ),
        (["{tmp}/bad.gguf", "{tmp}/out"], ["{tmp}/bad.gguf", "not a GGUF file"]),
        (["{tmp}/cut.gguf", "{tmp}/out"], ["{tmp}/cut.gguf", "not a complete GGUF file"]),
        (["{tmp}/cut.gguf", "{tmp}/new/folder/out"], ["{tmp}/cut.gguf", "not a complete GGUF file"]),
        (["{llama}", "/dev/null/out"], ["/dev/null/out: cannot be made: Not a directory"]),
        (["{llama}", "{tmp}/out", "--revision", "main"], ["--revision main", "{llama} is a path"]),
        (["{tmp}/cut.gguf", "{tmp}/out", "--place", "link"], ["--place link", "{tmp}/cut.gguf is dequantized"]),
        (["{tmp}/a\0b", "{tmp}/out"], ["a\\x00b"]),
        (["{llama}", "{tmp}/a\0b"], ["a\\x00b"]),
        (["{llama}", "{tmp}/" + "x" * 300], ["File name too long"]),
    ],
)
def test_bad_arguments_get_one_clear_line(llama: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GG")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    before = set(tmp_path.rglob("*"))
    code, _, err = run("convert", *(argument.format(llama=llama, tmp=tmp_path) for argument in arguments))
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word.format(llama=llama, tmp=tmp_path) in err for word in words), err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", [["--granularity", "channelwise"], ["--place", "move"], ["--gate-init", "open"]])
def test_a_bad_option_names_its_choices(llama: Path, tmp_path: Path, option: list[str]) -> None:
    code, _, err = run("convert", llama, tmp_path / "out", *option)
    assert code == 2
    assert option[0] in err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    code, out, err = run("convert", llama, tmp_path / "new" / "gated", "--granularity", "elementwise", "--dry-run")
    assert (code, err) == (0, "")
    assert set(tmp_path.rglob("*")) == before
    assert "tensors to add    6, 15,768 parameters" in out
    assert "model.layers.*.self_attn.g_proj.weight [72, 72]" in out
    assert re.search(r"model-00001-of-00002\.safetensors +405\.9 kB  model\.safetensors, byte for byte", out)
    assert "elementwise in 3 layers, opening 0.85" in out
    run("convert", llama, tmp_path / "gated", "--granularity", "elementwise")
    for path in (tmp_path / "gated").iterdir():
        assert f"  {path.name} " in out
    assert run("convert", llama, tmp_path / "gated", "--dry-run")[0] == 1  # exists


@pytest.mark.fast
def test_verify_tells_by_its_exit_code(llama: Path, tmp_path: Path) -> None:
    run("convert", llama, tmp_path / "gated", "--place", "copy")
    code, out, err = run("verify", llama, tmp_path / "gated", "--tokens", "20")
    assert (code, err) == (0, "")
    for line in (
        "verdict           identical",
        "logits            20 tokens",
        "max difference    0",
        "top-1 agreement   100",
    ):
        assert f"\n{line}" in f"\n{out}", out
    gates = max((tmp_path / "gated").glob("*.safetensors"))
    tensors = load_file(gates)
    tensors["model.layers.1.self_attn.g_proj.bias"] -= 3
    save_file(tensors, gates, metadata={"format": "pt"})
    code, out, _ = run("verify", llama, tmp_path / "gated")
    assert code == 1
    assert "verdict           different" in out and "in layers 1\n" in out


def test_ungate_restores_or_says_why_not(llama: Path, tmp_path: Path) -> None:
    run("convert", llama, tmp_path / "gated")
    code, out, err = run("ungate", tmp_path / "gated", tmp_path / "back")
    assert (code, err) == (0, "")
    assert f"files restored    {len(list(llama.iterdir()))}\n" in out
    code, _, err = run("ungate", llama, tmp_path / "again")
    assert code == 1 and "must be gated_llama, got 'llama'" in err and err.count("\n") == 1


def test_tensors_that_the_model_does_not_read_are_told(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    more = {f"model.layers.{layer}.mlp.up_proj.weight": torch.zeros(80, 72) for layer in (3, 4)}
    save_file(tensors | more, llama / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("convert", llama, tmp_path / "gated")
    assert code == 0
    assert err.startswith(
        "note: the model does not use these tensors of the source: model.layers.3.mlp.up_proj.weight, "
    )
    assert err.count("\n") == 1


def test_an_interrupt_ends_in_a_line(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_gated.checkpoints.shards.place_file", interrupt)
    assert run("convert", llama, tmp_path / "gated") == (130, "", "error: interrupted; nothing was left behind\n")
    assert {path.name for path in tmp_path.iterdir()} == {"llama"}

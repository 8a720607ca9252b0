"""A checkpoint with sinks in, one without them out: whole, interrupted, given wrong things."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from modeling_gated import absorption
from modeling_gated.absorption import AbsorptionError, AbsorptionSettings, absorb_checkpoint, work
from modeling_gated.cli import app
from modeling_gated.configuration import OPEN_GATE_WEIGHT, open_gate
from modeling_gated.configuration.configuration_gated_llama import CARRIED_MODULES
from modeling_gated.conversion import ConversionError, convert_checkpoint
from modeling_gated.inspection import FirstTokenAttention, inspecting
from modeling_gated.training import loop
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.sink_model import WRITERS, sink_model


SETTINGS = AbsorptionSettings(
    distill_tokens=2048,
    sample_tokens=0,
    calibration_tokens=1024,
    window_tokens=64,
    long_window_tokens=500,  # more than the model takes
    batch_size=2,
    refinement_epochs=1,
    save_every=5,
    evaluate_every=4,
    measured_windows=3,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("absorbed") / "source"
    sink_model().to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    (folder / "LICENSE").write_text("Do what you like.", encoding="utf-8")
    # Without do_sample, as some models have it; not every Transformers saves that.
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def absorbed(source: Path) -> Path:
    absorb_checkpoint(source, source.parent / "absorbed", settings=SETTINGS)
    return source.parent / "absorbed"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_the_result_is_an_ordinary_gated_checkpoint(source: Path, absorbed: Path) -> None:
    """It loads with and without the package's code, in the source's dtype, and has no sink."""
    model = AutoModelForCausalLM.from_pretrained(absorbed).eval()
    assert model.config.model_type == "gated_llama"
    assert {tensor.dtype for tensor in weights(absorbed).values()} == {torch.bfloat16}
    assert CARRIED_MODULES.keys() <= {path.name for path in absorbed.iterdir()}
    assert not absorbed.with_name("absorbed.partial").exists()
    for name in ("LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (absorbed / name).read_bytes() == (source / name).read_bytes()
    tokens = AutoTokenizer.from_pretrained(absorbed)("Some text, and more of it. " * 4, return_tensors="pt").input_ids
    meters = FirstTokenAttention(), FirstTokenAttention()
    for path, meter in zip((source, absorbed), meters, strict=True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad(), inspecting(model, meter):
            model(tokens)
    before, after = (meter.result()[1:, :2].mean() for meter in meters)
    assert after < 0.15 * before
    assert len(model.generate(tokens, max_new_tokens=4, do_sample=False)[0]) == tokens.shape[1] + 4


def test_gates_without_sinks_are_still_one(absorbed: Path) -> None:
    tensors = weights(absorbed)
    weights_of_gates = [tensors[f"model.layers.{layer}.self_attn.g_proj.weight"] for layer in range(4)]
    moved = [bool((weight != OPEN_GATE_WEIGHT).any()) for weight in weights_of_gates]
    assert moved == [False, True, True, True]
    assert (tensors["model.layers.0.self_attn.g_proj.bias"] == open_gate(0.85)[0]).all()


def test_the_report_and_the_card_say_what_was_done(absorbed: Path) -> None:
    report = json.loads((absorbed / "absorption.json").read_text(encoding="utf-8"))
    assert {writer["layer"]: writer["neuron"] for writer in report["writers"]} == WRITERS
    assert len(report["layers"]) == 4
    assert len(report["losses"]) == 12
    assert len(report["validation_losses"]) == 3
    assert {comparison["kind"] for comparison in report["comparisons"]} >= {"prose", "documentation", "code"}
    assert set(report["seconds"]) == {"sampling", "edit", "distillation", "proof"}
    assert report["source"] == {"name": "source", "repo_id": None, "revision": None}
    assert (report["texts"], report["dtype"]) == ({}, "float32")
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["seed"] == 0
    assert report["settings"]["long_window_tokens"] == 256
    card = (absorbed / "README.md").read_text(encoding="utf-8")
    assert "| gates fitted | in 3 of 4 layers |" in card
    assert report["distilled_tokens"] == 2048
    assert "| distilled on | 2,048 tokens |" in card
    first = report["comparisons"][0]
    assert f"| {first['perplexity_ratio']:.4f} |" in card


@pytest.mark.parametrize("interrupted_in", ["absorb_sinks", "train_step", "prove"])
def test_an_interrupted_run_goes_on(
    source: Path, absorbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_in: str
) -> None:
    """With the same result, and without doing again what was done."""
    calls: list[str] = []

    def interrupt(module: object, name: str, at: int) -> None:
        original = getattr(module, name)

        def interrupted(*arguments: object, **options: object) -> object:
            calls.append(name)
            if name == interrupted_in and calls.count(name) == at:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, interrupted)

    interrupt(work, "absorb_sinks", 1)
    interrupt(loop, "train_step", 8)
    interrupt(work, "prove", 1)
    output = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        absorb_checkpoint(source, output, settings=SETTINGS)
    assert not output.exists()
    absorb_checkpoint(source, output, settings=SETTINGS)
    assert [calls.count(name) for name in ("absorb_sinks", "train_step", "prove")] == {
        "absorb_sinks": [2, 12, 1],
        "train_step": [1, 8 + 7, 1],
        "prove": [1, 12, 2],
    }[interrupted_in]
    expected, actual = weights(absorbed), weights(output)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_other_settings_do_not_go_on_from_there(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "absorb_sinks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        absorb_checkpoint(source, tmp_path / "out", settings=SETTINGS)
    with pytest.raises(AbsorptionError, match=r"out\.partial: .*seed.*; remove the folder"):
        absorb_checkpoint(source, tmp_path / "out", settings=AbsorptionSettings(**vars(SETTINGS) | {"seed": 1}))


def test_another_checkpoint_does_not_go_on_from_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has the same name."""

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    copy = shutil.copytree(source, tmp_path / "source")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(work, "absorb_sinks", interrupt)
        absorb_checkpoint(copy, tmp_path / "out", settings=SETTINGS)
    sink_model(scale=1.2).to(torch.bfloat16).save_pretrained(copy)
    with pytest.raises(AbsorptionError, match=r"out\.partial: .*config\.json \(size, mtime_ns\).*; remove the folder"):
        absorb_checkpoint(copy, tmp_path / "out", settings=SETTINGS)


def test_given_text_is_what_it_learns_from(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the package's own is what it is measured on."""
    seen: list[torch.Tensor] = []
    shapes: list[tuple[int, ...]] = []
    train_step, absorb_sinks = loop.train_step, work.absorb_sinks

    def recorded(run: loop.Run, *arguments: object) -> tuple[float, int]:
        seen.append(run.text.training_batch(64, 0, 50, 0))
        shapes.append(tuple(run.text.training_batch(64, 4, 2, 0).shape))
        return train_step(run, *arguments)

    def edited(original: object, model: object, windows: list[torch.Tensor], *arguments: object, **options: object):
        shapes.extend(tuple(window.shape) for window in windows)
        return absorb_sinks(original, model, windows, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", recorded)
    monkeypatch.setattr(work, "absorb_sinks", edited)
    path = tmp_path / "letters.txt"
    path.write_text("abab" * 500, encoding="utf-8")
    done = absorb_checkpoint(source, tmp_path / "out", text=[path], settings=SETTINGS)
    letters = set(byte_tokenizer()("ab").input_ids)
    assert set(seen[0].flatten().tolist()) == letters
    # Edited on one window at a time, half of the tokens in long ones, which are half of training's, too.
    assert shapes == [(1, 64), (1, 64), (1, 64), (1, 64), (1, 256)] * 2 + [(1, 256)] * 12
    assert {comparison.kind for comparison in done.comparisons} == {"prose", "documentation", "code", "letters"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{tmp_path / 'out'} --text {path} --distill-tokens 2048 --sample-tokens 0 --seed 0`" in card


def test_what_the_model_writes_itself_is_learnt_from_too(source: Path, tmp_path: Path) -> None:
    """And kept, so that it is not written again."""
    convert_checkpoint(source, tmp_path / "gated")
    settings, tokenizer = AbsorptionSettings(**vars(SETTINGS) | {"sample_tokens": 300}), byte_tokenizer(chat=True)
    cpu = torch.device("cpu")
    steps = work.Work(tmp_path, tmp_path / "gated", tokenizer, settings, torch.float32, cpu, progress=False)
    texts = {text.kind: text for text in steps.texts([])}
    assert list(texts) == ["prose", "documentation", "code", "chat", "sampled"]
    assert all(len(texts[kind].training) + len(texts[kind].held_out) >= 150 for kind in ("chat", "sampled"))
    assert (tmp_path / "sampled.json").is_file()
    assert {text.kind: text for text in steps.texts([])} == texts


def test_without_a_chat_template_all_of_it_is_text(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "gated")
    settings, cpu = AbsorptionSettings(**vars(SETTINGS) | {"sample_tokens": 1200}), torch.device("cpu")
    steps = work.Work(tmp_path, tmp_path / "gated", byte_tokenizer(), settings, torch.float32, cpu, progress=False)
    texts = {text.kind: text for text in steps.texts([])}
    assert list(texts) == ["prose", "documentation", "code", "sampled"]
    sampled = texts["sampled"]
    assert len(sampled.training) + len(sampled.validation) + len(sampled.held_out) >= 1200


def test_it_can_be_computed_in_bfloat16(source: Path, absorbed: Path, tmp_path: Path) -> None:
    """Its weights keep float32 copies while they learn: the loss comes near to that of float32."""
    done = absorb_checkpoint(source, tmp_path / "out", settings=SETTINGS, dtype=torch.bfloat16)
    report, expected = (json.loads((path / "absorption.json").read_text()) for path in (done.output, absorbed))
    assert (report["dtype"], expected["dtype"]) == ("bfloat16", "float32")
    assert report["validation_losses"][-1] == pytest.approx(expected["validation_losses"][-1], rel=0.1)
    assert "--dtype bfloat16" in (done.output / "README.md").read_text(encoding="utf-8")


def test_float32_gates_stay_float32(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "converted")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", gate_dtype="float32")
    model.generation_config = GenerationConfig()  # the source's is one that not every Transformers saves
    model.save_pretrained(tmp_path / "gated")
    byte_tokenizer(chat=True).save_pretrained(tmp_path / "gated")
    settings = AbsorptionSettings(**vars(SETTINGS) | {"distill_tokens": 0})
    tensors = weights(absorb_checkpoint(tmp_path / "gated", tmp_path / "out", settings=settings).output)
    assert {tensor.dtype for name, tensor in tensors.items() if ".g_proj." in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if ".g_proj." not in name} == {torch.bfloat16}
    gate = tensors["model.layers.1.self_attn.g_proj.weight"]
    assert not torch.equal(gate, gate.bfloat16().float())


def test_a_text_that_is_too_short_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc" * 40, encoding="utf-8")
    with pytest.raises(AbsorptionError, match=r"/short\.txt: .* window of 64 tokens, got 120 tokens"):
        absorb_checkpoint(source, tmp_path / "out", text=[tmp_path / "short.txt"], settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_another_setup_of_accelerate_is_told_at_once(source: Path, tmp_path: Path) -> None:
    """As a Trainer leaves it in a notebook, for all that comes after in its process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16", cpu=True)
        with pytest.raises(AbsorptionError, match="accelerate must be unused or set up without mixed precision"):
            absorb_checkpoint(source, tmp_path / "out", settings=SETTINGS)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AbsorptionError, match=r"dtype must be .*, got torch\.float16"):
        absorb_checkpoint(source, tmp_path / "out", settings=SETTINGS, dtype=torch.float16)


def test_gates_that_were_trained_are_refused(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "gated")
    done = absorb_checkpoint(
        tmp_path / "gated", tmp_path / "out", settings=AbsorptionSettings(**vars(SETTINGS) | {"distill_tokens": 0})
    )
    assert done.losses == []
    with pytest.raises(AbsorptionError, match=r"gates must be 1, got .* in layers 1-3"):
        absorb_checkpoint(tmp_path / "out", tmp_path / "again", settings=SETTINGS)
    assert not list(tmp_path.glob("again*"))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}", "{out}", "--text", "{none}"], "none.txt: No such file or directory"),
        (["{source}", "{out}", "--dtype", "int8"], "--dtype must be bfloat16 or float32, got int8"),
        (["{source}", "{out}", "--distill-tokens", "-1"], "--distill-tokens must be at least 0, got -1"),
        (["{source}", "{source}"], "must not contain each other"),
        (["{none}", "{out}"], "none.txt"),
        (["{source}", "{out}", "--device", "cuda:9"], "--device must be usable by torch, got cuda:9"),
        (["{source}", "{source}/config.json/out"], "config.json"),
    ],
)
def test_wrong_input_is_one_line(source: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"source": source, "out": tmp_path / "out", "none": tmp_path / "none.txt"}
    result = CliRunner().invoke(app, ["absorb", *(word.format(**places) for word in arguments)])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_what_was_measured(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: getattr(SETTINGS, name) for name in ("calibration_tokens", "window_tokens", "measured_windows")}
    monkeypatch.setattr(absorption, "AbsorptionSettings", partial(AbsorptionSettings, **small))
    words = ["absorb", str(source), str(tmp_path / "out"), "--distill-tokens", "0", "--sample-tokens", "0"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "documentation" in result.stdout
    assert "first-token attention" in result.stdout
    assert re.search(r"prose +\d+ x 256 +plain +[\d.]+ +[\d.]+ +\d\.\d{4} +", result.stdout)  # nothing is cut off
    assert (tmp_path / "out" / "absorption.json").is_file()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "already exists; --overwrite replaces it" in again.stderr


def test_the_installed_command_finds_all_it_needs(source: Path, tmp_path: Path) -> None:
    """In a process of its own, in which importing the package has imported nothing yet."""
    command = [Path(sys.executable).with_name("gated-llama"), "absorb", source, tmp_path / "out"]
    finished = subprocess.run([*command, "--text", tmp_path / "none.txt"], capture_output=True, text=True)
    # bitsandbytes, which PEFT imports, warns on some CPUs of a kernel of its own that is not there.
    lines = [line for line in finished.stderr.splitlines() if "kernels-community" not in line]
    assert (finished.returncode, lines) == (1, [f"error: {tmp_path}/none.txt: No such file or directory"])
    (tmp_path / "short.txt").write_text("abc" * 40, encoding="utf-8")
    finished = subprocess.run([*command, "--text", tmp_path / "short.txt"], capture_output=True, text=True)
    assert finished.returncode == 1
    *before, last = finished.stderr.splitlines()
    assert last.startswith(f"error: {tmp_path}/short.txt: ") and "window of 256 tokens, got 120 tokens" in last
    assert not any("transformers" in line for line in before)  # which would warn of a model that it does not know


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("edited/edit.json", "edited"),
        ("edited/directions.safetensors", "edited"),
        ("sampled.json", "sampled.json"),
        ("seconds.json", "seconds.json"),
    ],
)
def test_a_damaged_step_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, named: str
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(work, "distil", interrupt)
        absorb_checkpoint(source, tmp_path / "out", settings=SETTINGS)
    path = tmp_path / "out.partial" / name
    path.write_bytes(path.read_bytes()[:-1][:20])
    with pytest.raises(
        AbsorptionError, match=rf"out\.partial/{re.escape(named)}: must be a complete result .*; remove it"
    ):
        absorb_checkpoint(source, tmp_path / "out", settings=SETTINGS)


def test_fused_gates_are_refused(tmp_path: Path) -> None:
    """Those that a checkpoint has are not 1, and a teacher without them would be another model."""
    model = sink_model()
    config = model.config.to_dict() | {"headwise_attn_output_gate": True}
    state = model.state_dict()
    for number in range(4):
        name = f"model.layers.{number}.self_attn.q_proj.weight"
        queries = state[name].view(2, 16, 32)
        state[name] = torch.cat([queries, torch.randn(2, 2, 32)], dim=1).flatten(0, 1)
        for norm in ("q_norm", "k_norm"):  # of Qwen3, in which the authors have them
            state[name.replace("q_proj", norm)] = torch.ones(8)
    folder = tmp_path / "fused"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(AbsorptionError, match="fused: gates must be 1"):
        absorb_checkpoint(folder, tmp_path / "out", settings=SETTINGS)
    assert list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_converted_cannot_be_absorbed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    save_file({"transformer.wte.weight": torch.zeros(4, 4)}, source / "model.safetensors")
    with pytest.raises(ConversionError, match="gpt2"):
        absorb_checkpoint(source, tmp_path / "out", settings=SETTINGS)
    assert list(tmp_path.iterdir()) == [source]

"""The training recipes: what they compare starts equal, sees the same batches, and goes on where it was stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback

from examples.recipes import continue_pretraining, distill, tune_chat, tune_gates
from examples.shared.packed_text import PackedText
from examples.shared.recipe import HeldOut, measure
from modeling_gated.conversion import convert_checkpoint
from modeling_gated.training import loop
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.tiny_configs import tiny_llama


FLAGS = {
    "steps": 4,
    "length": 64,
    "batch_size": 2,
    "seeds": 0,
    "save_every": 2,
    "evaluation_windows": 2,
    "warmup_steps": 1,
    "gate_learning_rate": 0.05,
    "learning_rate": 0.01,
}
RECIPES = [tune_gates, tune_chat, continue_pretraining, distill]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of bytes and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama(vocab_size=258, bos_token_id=256, eos_token_id=257)).save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(str(number) for number in range(2000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    conversations = (
        [{"role": "user", "content": f"{number}+1?"}, {"role": "assistant", "content": f"It is {number + 1}."}]
        for number in range(40)
    )
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(model: Path, text: Path, chat: Path) -> Callable[..., Path]:
    def run_recipe(recipe: ModuleType, output: Path, *flags: str) -> Path:
        data = ["--chat", str(chat)] if recipe is tune_chat else ["--text", str(text)]
        words = [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
        AcceleratorState._reset_state(reset_partial_state=True)  # each recipe is a program of its own
        recipe.main(["--model", str(model), *data, "--output", str(output), *words, *flags])
        return output

    return run_recipe


@pytest.fixture(scope="module")
def finished(run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModuleType], Path]:
    """The output of a recipe that nothing interrupts."""
    outputs: dict[str, Path] = {}

    def once(recipe: ModuleType) -> Path:
        if recipe.__name__ not in outputs:
            outputs[recipe.__name__] = run(recipe, tmp_path_factory.mktemp("outputs") / recipe.__name__)
        return outputs[recipe.__name__]

    return once


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has trained."""
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def runs(recipe: ModuleType) -> list[str]:
    return ["distilled-seed0"] if recipe is distill else ["gated-seed0", "control-seed0"]


@pytest.mark.parametrize("recipe", [tune_gates, tune_chat, continue_pretraining])
def test_both_start_equal_and_learn(recipe: ModuleType, finished: Callable[[ModuleType], Path]) -> None:
    output = finished(recipe)
    gated, control = (result(output / name) for name in runs(recipe))
    assert gated["before"]["gate"] == 1
    assert gated["before"]["gate_drift"] == 0
    for name in ("loss", "first_token_attention"):
        assert gated["before"][name] == pytest.approx(control["before"][name], abs=1e-5)
    assert gated["losses"][0] == pytest.approx(control["losses"][0], abs=1e-5)
    for actual in (gated, control):
        assert len(actual["losses"]) == 4
        assert actual["after"]["loss"] < actual["before"]["loss"]
    assert gated["after"]["gate_drift"] > 1e-3
    assert "gate" not in control["after"]
    assert (output / "comparison.png").stat().st_size > 10_000
    assert json.loads((output / "results.json").read_text())["runs"]["gated"]["0"] == gated


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_run_ends_as_an_uninterrupted_one(
    recipe: ModuleType,
    run: Callable[..., Path],
    finished: Callable[[ModuleType], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after its third step, of which the second was saved, it takes the third again."""
    taken: list[int] = []

    class Interruption(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
            taken.append(state.global_step - 1)
            if len(taken) == 3:
                raise KeyboardInterrupt

    uninterrupted = finished(recipe)
    train_step, initialize = loop.train_step, Trainer.__init__

    def interrupted_step(*args: object) -> tuple[float, int]:
        loss = train_step(*args)
        taken.append(args[-1])
        if len(taken) == 3:
            raise KeyboardInterrupt
        return loss

    def initialize_interrupted(self: Trainer, *args: object, **kwargs: object) -> None:
        initialize(self, *args, **kwargs)
        self.add_callback(Interruption)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    monkeypatch.setattr(Trainer, "__init__", initialize_interrupted)
    output = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, output)
    run(recipe, output)
    assert taken[:5] == [0, 1, 2, 2, 3]
    count = len(taken)
    for name in runs(recipe):
        expected, actual = weights(uninterrupted / name), weights(output / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
        assert result(output / name)["losses"] == result(uninterrupted / name)["losses"]
    run(recipe, output)
    assert len(taken) == count  # what is finished is not trained again


def test_all_see_the_same_batches(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    training_batch = PackedText.training_batch

    def recorded(self: PackedText, *args: int) -> torch.Tensor:
        seen.append(training_batch(self, *args))
        return seen[-1]

    monkeypatch.setattr(PackedText, "training_batch", recorded)
    run(continue_pretraining, tmp_path / "output", "--seeds", "3", "4")
    gated3, control3, gated4, control4 = torch.stack(seen).split(4)
    assert torch.equal(gated3, control3)
    assert torch.equal(gated4, control4)
    assert not torch.equal(gated3, gated4)


def test_only_gates_are_tuned(finished: Callable[[ModuleType], Path]) -> None:
    output = finished(tune_gates)
    gated, control = (result(output / name)["trainable_parameters"] for name in runs(tune_gates))
    assert gated == 2 * 4 * 33
    assert control == 2 * 2 * (32 + 32)  # rank 2: 132 parameters of a layer's gates, 64 for each rank
    assert {name.split(".")[-3] for name in weights(output / "gated-seed0")} == {"g_proj"}


def test_pretraining_leaves_checkpoints_that_load(finished: Callable[[ModuleType], Path], model: Path) -> None:
    output = finished(continue_pretraining)
    gated, control = (AutoModelForCausalLM.from_pretrained(output / name) for name in runs(continue_pretraining))
    assert (gated.config.model_type, control.config.model_type) == ("gated_llama", "llama")
    before = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(control.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)


def test_distillation_brings_the_student_nearer(
    finished: Callable[[ModuleType], Path], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = finished(distill)
    actual = result(output / "distilled-seed0")
    assert actual["before"]["gate"] == pytest.approx(0.85, abs=0.004)
    for name in ("kl_loss", "attention_loss"):
        assert actual["after"][name] < actual["before"][name]
    student, source = (AutoModelForCausalLM.from_pretrained(path) for path in (output / "distilled-seed0", model))
    assert student.config.gate_dtype == "float32"
    for name, parameter in source.bfloat16().named_parameters():
        assert torch.equal(student.get_parameter(name).bfloat16(), parameter)


def test_a_student_of_ones_own(finished: Callable[[ModuleType], Path], text: Path, model: Path, tmp_path: Path) -> None:
    """Its attention is trained; the teacher is what it was, before and after, and the text is in its own tokens."""
    flags = {**FLAGS, "student": finished(distill) / "start", "text": text, "output": tmp_path / "output"}
    flags |= {"trained": "attention", "gate_scale": 1.0, "learning_rate": 1e-4}
    AcceleratorState._reset_state(reset_partial_state=True)
    distill.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    actual = result(tmp_path / "output" / "distilled-seed0")
    assert actual["after"]["teacher's loss"] == pytest.approx(actual["before"]["teacher's loss"], abs=1e-6)
    assert actual["after"]["attention_loss"] < actual["before"]["attention_loss"]
    assert not (tmp_path / "output" / "start").exists()
    tokens = (finished(distill) / "tokens.bin").read_bytes()
    assert (tmp_path / "output" / "tokens.bin").read_bytes() == tokens
    with pytest.raises(SystemExit) as error:
        distill.main(["--student", str(model), "--output", str(tmp_path / "other")])
    assert f"--student must be a gated checkpoint, got {model} with model_type='llama'" in str(error.value.code)


def test_a_state_that_was_being_written_is_not_gone_on_from(
    run: Callable[..., Path], finished: Callable[[ModuleType], Path], tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    shutil.copytree(finished(tune_gates), output)
    (output / "gated-seed0" / "result.json").unlink()
    state = output / "gated-seed0" / "state" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text(encoding="utf-8")[:50], encoding="utf-8")
    run(tune_gates, output)
    expected, actual = (weights(path / "gated-seed0") for path in (finished(tune_gates), output))
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_no_paragraph_of_a_held_out_answer_is_trained_on() -> None:
    training, held = tune_chat.split(tune_chat.Settings())
    known = {paragraph for messages in training for paragraph in messages[-1]["content"].split("\n\n")}
    assert len(held) >= 5
    for messages in held:
        assert known.isdisjoint(messages[-1]["content"].split("\n\n"))


def test_an_output_can_be_moved(
    run: Callable[..., Path], finished: Callable[[ModuleType], Path], tmp_path: Path
) -> None:
    shutil.copytree(finished(tune_gates), tmp_path / "moved")
    run(tune_gates, tmp_path / "moved")


def test_measures_are_what_they_say(model: Path, tmp_path: Path) -> None:
    """Against the whole attention matrices and logits, and gates by hand; for queries after the first."""
    convert_checkpoint(model, tmp_path / "gated")
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", attn_implementation="eager").train()
    with torch.no_grad():
        for layer in gated.model.layers:
            layer.self_attn.g_proj.weight.normal_()
    sequences = [HeldOut(torch.randint(256, (length,)), prompt) for length, prompt in ((20, 1), (30, 12))]
    measurements = measure(gated, sequences)
    assert gated.training
    gated.eval()
    losses, attention, gates = [], [], []
    for layer in gated.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, _, inputs: gates.append(torch.sigmoid(module.g_proj(inputs["hidden_states"])) / 0.85),
            with_kwargs=True,
        )
    for sequence in sequences:
        output = gated(sequence.tokens[None], output_attentions=True)
        predicted = output.logits[0, sequence.given - 1 : -1]
        losses.append(functional.cross_entropy(predicted, sequence.tokens[sequence.given :], reduction="none"))
        attention.append(torch.stack([layer[0, :, 1:, 0] for layer in output.attentions]))
    assert measurements["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert len(torch.cat(losses)) == 19 + 18
    assert measurements["first_token_attention"] == pytest.approx(torch.cat(attention, dim=-1).mean().item(), abs=1e-6)
    values = torch.cat([gate.flatten() for gate in gates])
    assert measurements["gate"] == pytest.approx(values.mean().item(), rel=1e-3)  # the opening is 0.85 in bfloat16
    assert measurements["gate_drift"] == pytest.approx((values - 1).abs().mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        (tune_gates, ["--steps", "0"], "--steps must be at least 1, got 0"),
        (tune_gates, ["--seeds", "1", "1"], "got [1, 1]"),
        (tune_gates, ["--gate_learning_rate", "nan"], "--gate_learning_rate must be positive and finite, got nan"),
        (tune_gates, ["--model", "nowhere"], "--model must be the folder of a checkpoint, got nowhere"),
        (tune_gates, ["--text", "nowhere/*.txt"], "--text must match a file"),
        (tune_gates, ["--length", "100000"], "--length must fit"),
        (continue_pretraining, ["--mixed_precision", "fp16"], "--mixed_precision must be bf16 or no, got fp16"),
        (tune_chat, ["--chat", "nowhere.jsonl"], "nowhere.jsonl"),
        (tune_chat, ["--length", "4"], "--length must fit a held-out question, got 4"),
        (tune_chat, ["--text", "x"], "--text must not be given"),
        (distill, ["--dtype", "float16"], "--dtype must be bfloat16 or float32, got float16"),
        (distill, ["--student", "nowhere"], "--student must be the folder of a checkpoint, got nowhere"),
        (distill, ["--kl_weight", "-1"], "--kl_weight must be at least 0, got -1.0"),
        (distill, ["--kl_weight", "0", "--attention_weight", "0"], "there is nothing to learn"),
    ],
)
def test_wrong_flag_gets_one_line(
    run: Callable[..., Path], tmp_path: Path, recipe: ModuleType, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        run(recipe, tmp_path / "output", *flags)
    assert str(error.value.code).startswith("error: ")
    assert message in str(error.value.code)
    assert "\n" not in str(error.value.code)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "line 2 must be a conversation"),
        ('{"prompt": "x"}', "line 2 must be a conversation, got KeyError"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "line 2 must be a conversation, got ValueError('the last message",
        ),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2 must be a conversation, got TypeError"),
    ],
)
def test_line_that_is_no_conversation_is_named(
    run: Callable[..., Path], chat: Path, tmp_path: Path, line: str, message: str
) -> None:
    spoiled = tmp_path / "spoiled.jsonl"
    first, *rest = chat.read_text(encoding="utf-8").splitlines()
    spoiled.write_text("\n".join([first, line, *rest]), encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        run(tune_chat, tmp_path / "output", "--chat", str(spoiled))
    assert f"error: {spoiled}: {message}" in str(error.value.code)


def test_output_of_other_settings_is_refused(run: Callable[..., Path], finished: Callable[[ModuleType], Path]) -> None:
    with pytest.raises(SystemExit) as error:
        run(tune_gates, finished(tune_gates), "--steps", "5")
    assert all(word in str(error.value.code) for word in ("steps", "4", "5"))

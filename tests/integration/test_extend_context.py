"""The example that extends a context goes on where it was stopped; what it trains on, and the loss, are as it says."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from examples.recipes import extend_context
from examples.recipes.extend_context_settings import SettingsError, read_settings
from examples.shared.accelerate_training import WindowLoss
from examples.shared.packed_text import PackedText
from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.training import loop
from tests.helpers.gated_models import gated_model
from tests.helpers.largest_tensor import Largest
from tests.helpers.tiny_configs import tiny_llama


SETTINGS = """
rope_theta = 1e5
length = 64
steps = 6
batch_size = 2
gradient_accumulation_steps = 2
learning_rate = 1e-3
warmup_steps = 2
yarn_length = 128
evaluation_windows = 2
save_every = 2
text = ["TEXT"]

[from_scratch]
length = 32
steps = 4
batch_size = 2
learning_rate = 1e-3
vocabulary_size = 300

[from_scratch.config]
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
tie_word_embeddings = true
"""
EXAMPLES = Path(extend_context.__file__).parent


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    for number, topic in enumerate(list(topics.values())[:10]):
        (folder / f"{number}.txt").write_text(topic, encoding="utf-8")
    path = folder / "settings.toml"
    path.write_text(SETTINGS.replace("TEXT", str(folder / "*.txt")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("outputs") / "finished"
    run(config, output)
    return output


def run(config: Path, output: Path) -> None:
    extend_context.main(["--config", str(config), "--output", str(output)])


class Interruptions:
    """Stops training before some of its steps, and keeps a list of the steps that were taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: tuple[str, int]) -> None:
        self.left, self.taken = list(steps), []
        self.train_step = loop.train_step
        monkeypatch.setattr(loop, "train_step", self)

    def __call__(self, *args: object) -> tuple[float, int]:
        *_, stage, step = args
        if (stage.name, step) in self.left:
            self.left.remove((stage.name, step))
            raise KeyboardInterrupt
        self.taken.append((stage.name, step))
        return self.train_step(*args)


def run_until_finished(config: Path, output: Path) -> Iterator[KeyboardInterrupt]:
    """Start again after every interruption, each of which is given."""
    while True:
        try:
            return run(config, output)
        except KeyboardInterrupt as interruption:
            yield interruption


def equal_weights(first: Path, second: Path) -> bool:
    expected, actual = (load_file(path / "model.safetensors") for path in (first, second))
    return expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)


def test_resumed_run_ends_as_an_uninterrupted_one(
    config: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interruptions = Interruptions(monkeypatch, ("short", 3), ("trained", 5))
    assert len(list(run_until_finished(config, tmp_path / "resumed"))) == 2
    # States are of every second step: step 2 of the one stage, and step 4 of the other, are taken again.
    expected = [("short", step) for step in (0, 1, 2, 2, 3)] + [("trained", step) for step in (0, 1, 2, 3, 4, 4, 5)]
    assert interruptions.taken == expected
    for name in ("short", "trained", "yarn"):
        assert equal_weights(finished / name, tmp_path / "resumed" / name)
    for name in ("results.json", "tokens.bin", "settings.json"):
        assert (finished / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_killed_while_saving_keeps_the_state_before(
    config: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, save_state = tmp_path / "killed", Accelerator.save_state

    def save_half(self: Accelerator, folder: str, **kwargs: object) -> None:
        save_state(self, folder, **kwargs)
        if (output / "state" / "trained-2").is_dir():
            for path in Path(folder).glob("*.bin"):
                path.write_bytes(path.read_bytes()[:100])
            monkeypatch.setattr(Accelerator, "save_state", save_state)
            raise KeyboardInterrupt

    shutil.copytree(finished, output, ignore=shutil.ignore_patterns("trained", "yarn", "results.json"))
    monkeypatch.setattr(Accelerator, "save_state", save_half)
    interruptions = Interruptions(monkeypatch)
    assert len(list(run_until_finished(config, output))) == 1
    assert interruptions.taken == [("trained", step) for step in (0, 1, 2, 3, 2, 3, 4, 5)]
    assert equal_weights(finished / "trained", output / "trained")


def test_finished_stages_are_skipped(config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interruptions = Interruptions(monkeypatch)
    run(config, finished)
    assert interruptions.taken == []


def test_yarn_checkpoint_loads_as_such(finished: Path) -> None:
    expected = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 2.0, "original_max_position_embeddings": 64}
    config = AutoConfig.from_pretrained(finished / "yarn")
    assert config.max_position_embeddings == 128
    assert expected.items() <= config.rope_parameters.items()
    model = AutoModelForCausalLM.from_pretrained(finished / "yarn")
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * np.log(2) + 1)
    trained = AutoConfig.from_pretrained(finished / "trained")
    assert (trained.max_position_embeddings, trained.rope_parameters["rope_theta"]) == (64, 1e5)
    assert AutoConfig.from_pretrained(finished / "short").rope_parameters["rope_theta"] == 1e4
    assert equal_weights(finished / "trained", finished / "yarn")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_is_the_plain_one(dtype: torch.dtype, tolerance: float, tied: bool) -> None:
    torch.manual_seed(0)
    model = GatedLlamaForCausalLM(tiny_llama(GatedLlamaConfig, tie_word_embeddings=tied)).to(dtype)
    windows = torch.randint(32, (2, 12))
    gradients = []
    for loss in (
        functional.cross_entropy(model(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()),
        WindowLoss(model, chunk_size=5)(windows),
    ):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance * 1e-2)


def test_loss_of_bfloat16_is_summed_in_float32() -> None:
    loss = WindowLoss(GatedLlamaForCausalLM(tiny_llama(GatedLlamaConfig)).bfloat16())
    assert loss(torch.zeros(1, 5, dtype=torch.long)).dtype == torch.float32


def test_no_tensor_of_a_step_grows_with_the_square_of_the_length() -> None:
    """Nor are there logits of all tokens."""
    model = gated_model(vocab_size=258, max_position_embeddings=2048).bfloat16().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    largest = {}
    for length in (512, 2048):
        with Largest() as largest[length]:
            WindowLoss(model, chunk_size=32)(torch.arange(length + 1)[None] % 258).backward()
    assert largest[2048].elements < 4.2 * largest[512].elements
    assert largest[2048].elements < 2048 * 258 / 3


def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    """Each epoch has every window of the first 90 % once, and evaluation has the others."""
    np.arange(1000, dtype=np.uint32).tofile(tmp_path / "tokens.bin")
    text = PackedText(tmp_path / "tokens.bin")
    for length in (7, 31, 64, 899):
        count = text.training_windows(length)
        epochs = [text.training_batch(length, epoch * count, count, seed=3) for epoch in range(2)]
        for windows in epochs:
            assert sorted(windows[:, 0].tolist()) == [length * number for number in range(count)]
            assert windows.max() < 900
            assert torch.equal(windows - windows[:, :1], torch.arange(length + 1).expand(count, -1))
        assert count < 10 or not torch.equal(*epochs)
    assert text.training_windows(900) == 0
    assert torch.equal(text.held_out_windows(49, 3)[:, [0, -1]], torch.tensor([[900, 949], [925, 974], [950, 999]]))


def test_stopped_order_goes_on(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint32).tofile(tmp_path / "tokens.bin")
    text = PackedText(tmp_path / "tokens.bin")
    whole = text.training_batch(64, 0, 40, seed=1)
    assert torch.equal(whole, torch.cat([text.training_batch(64, first, 8, seed=1) for first in range(0, 40, 8)]))
    assert not torch.equal(whole, text.training_batch(64, 0, 40, seed=2))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 6", "stepz = 6", "stepz=6 is unknown"),
        ("steps = 6", "", "steps must be given"),
        ("steps = 6", "steps = '6'", "steps must be of type int, got '6'"),
        ("steps = 6", "steps = true", "steps must be of type int, got True"),
        ("steps = 6", "steps = 0", "steps must be positive and finite, got 0"),
        ("rope_theta = 1e5", "rope_theta = nan", "rope_theta must be positive and finite, got nan"),
        ("rope_theta = 1e5", "rope_theta = 10", "rope_theta=10.0 does not raise the base"),
        ("steps = 4", "steps = -4", "from_scratch.steps must be positive and finite, got -4"),
        ("hidden_size", "hidden_sizes", "from_scratch.config.hidden_sizes must be a field of GatedLlamaConfig"),
        ("hidden_size = 16", "hidden_size = 'a'", "hidden_size"),
        ("length = 64", "length = 16", "length=16 is not more than the 32 tokens"),
        ("yarn_length = 128", "yarn_length = 64", "length=64 is not more than the 64 tokens"),
        ("steps = 6", "steps = 6\nmodel = 'x'", "either model or a table [from_scratch] must be given, got model='x'"),
        ("[from_scratch]", "tokenizer = 'nowhere'\n[from_scratch]", "tokenizer must be a folder, got 'nowhere'"),
        ("*.txt", "*.text", "text must match a file"),
        ('text = ["', 'text = [1, "', "text must be a list of str"),
        ("save_every = 2", "mixed_precision = 'fp8'", "mixed_precision must be 'no' or 'bf16', got 'fp8'"),
        ("steps = 6", "steps = ", "Invalid value"),
    ],
)
def test_wrong_setting_gets_one_line(config: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(config.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        run(wrong, tmp_path / "output")
    assert str(error.value.code).startswith(f"error: {wrong}: ")
    assert message in str(error.value.code)
    assert "\n" not in str(error.value.code)
    assert not (tmp_path / "output").exists()


def test_other_problems_get_one_line(config: Path, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    for new, output, message in (
        ("steps = 7", finished, f"{finished}: steps must be 6, as at its start, got 7; name another directory"),
        (
            "steps = 6",
            config.parent,
            f"{config.parent}: must be empty or the output of such a run; name another directory",
        ),
        (
            "steps = 6\nseed = 1",
            finished,
            f"{finished}: seed must be 0, as at its start, got 1; name another directory",
        ),
    ):
        other.write_text(config.read_text(encoding="utf-8").replace("steps = 6", new, 1), encoding="utf-8")
        with pytest.raises(SystemExit) as error:
            run(other, output)
        assert error.value.code == f"error: {message}"
    with pytest.raises(SystemExit, match=r"^error: nowhere\.toml: No such file or directory$"):
        run(Path("nowhere.toml"), tmp_path / "output")


def test_configurations_of_the_examples_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)  # where no model is
    assert read_settings(EXAMPLES / "extend_context_small.toml").yarn_length == 4096
    with pytest.raises(SettingsError, match=r"model must be .* without config\.json$"):
        read_settings(EXAMPLES / "extend_context_full.toml")

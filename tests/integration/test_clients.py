"""What people use models with: pipelines, chat templates, TRL, Trainer in processes of their own, device maps."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from trl import SFTConfig, SFTTrainer

from modeling_gated.training import GateTrainerMixin, gate_peft_config
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.gated_models import gated_model
from tests.helpers.processes import run_isolated


SIZES = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
CHAT = [{"role": "user", "content": "Is the gate open?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients") / "model"
    gated_model("headwise", **SIZES).save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    return folder


def test_a_pipeline_answers_a_chat(checkpoint: Path) -> None:
    """By the tokenizer's chat template; it says what the model generates."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    options = {"max_new_tokens": 12, "do_sample": False}
    tokens = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**tokens, **options)[0, tokens["input_ids"].shape[1] :]
    (actual,) = pipeline("text-generation", model=str(checkpoint))(CHAT, **options)
    assert actual["generated_text"][:-1] == CHAT
    assert actual["generated_text"][-1]["role"] == "assistant"
    assert actual["generated_text"][-1]["content"] == tokenizer.decode(generated, skip_special_tokens=True)


class GateSFTTrainer(GateTrainerMixin, SFTTrainer):
    """As in the README."""


DATA = {
    "chat": [{"messages": [*CHAT, {"role": "assistant", "content": f"As far as {number}."}]} for number in range(16)],
    "plain text": [{"text": f"The gate of head {number} is open."} for number in range(16)],
}


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA and gates", "full"])
@pytest.mark.parametrize("data", list(DATA))
def test_trl_tunes(checkpoint: Path, tmp_path: Path, data: str, adapter: bool) -> None:
    """The loss falls, gates move and, with an adapter, the rest of the base does not; what is saved loads."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = SFTConfig(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=8,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_length=64,
    )
    peft_config = gate_peft_config(LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if adapter else None
    trainer = GateSFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(DATA[data]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=peft_config,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - (0.01 if adapter else 0.2)
    folder = tmp_path / "checkpoint-8"
    if adapter:
        tensors = load_file(folder / "adapter_model.safetensors")
        assert any("g_proj" in name for name in tensors)
        assert all("g_proj" in name or "q_proj.lora" in name for name in tensors)
    else:
        after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert before.keys() == after.keys()
        assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("package", [True, False], ids=["with the package", "without"])
def test_trainer_goes_on_in_a_fresh_process(checkpoint: Path, tmp_path: Path, package: bool) -> None:
    """From the checkpoint that Trainer wrote; it ends where an uninterrupted run does."""
    code = "package" if package else "carried"
    for output, steps in (("whole", "4"), ("halves", "2"), ("halves", "4")):
        (tmp_path / output).mkdir(exist_ok=True)
        done = run_isolated("resume_trainer.py", checkpoint, tmp_path / output, steps, code, is_package=package)
        assert done.returncode == 0, done.stderr
    whole, halves = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("whole", "halves"))
    start = load_file(checkpoint / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, rtol=0, atol=1e-6)
        assert not torch.equal(tensor, start[name])


@pytest.mark.parametrize("limit", [None, 150_000], ids=["all in memory", "partly on the disk"])
def test_a_device_map_places_the_model(
    checkpoint: Path, tmp_path: Path, tokens: torch.Tensor, limit: int | None
) -> None:
    """Gates with their layers; the logits stay what they are."""
    options = {} if limit is None else {"max_memory": {"cpu": limit}, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto", **options)
    # What is on the disk is on no device.
    assert {parameter.device.type for parameter in model.parameters()} == (
        {"cpu"} if limit is None else {"cpu", "meta"}
    )
    with torch.no_grad():
        expected, actual = AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits, model(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)

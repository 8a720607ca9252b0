"""
Train LoRA and all gates on conversations with TRL's SFTTrainer. The baseline is LoRA on the ungated model.

    python examples/recipes/tune_chat.py [--steps 40] [--chat conversations.jsonl] [--output build/tune_chat]

Each line of the file is an object with "messages", a list of {"role", "content"} as in TRL. The last message is the
assistant's answer, on which the model is trained. The default conversations are questions about Python with answers
from its language reference, a topic each. A tenth of the conversations is held out. Both models see the same batches.
Each seed's adapter is in OUTPUT/gated-seedN/adapter. An interrupted run resumes when started again. Needs
pip install '.[trl,plot]'.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from modeling_gated.training import GateTrainerMixin, gate_peft_config


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to import from examples, if run by its path

from examples.shared.recipe import (
    HeldOut,
    RecipeSettings,
    one_clear_line,
    open_output,
    prepare,
    read_flags,
    setting,
)
from examples.shared.trainer_recipe import arguments, one_process, run_all, tune


Conversation = list[dict[str, str]]


@dataclass
class Settings(RecipeSettings):
    output: str = setting("build/tune_chat", "folder for all results")
    chat: str = setting("", "file of conversations, a JSON object per line (default: questions about Python)")
    rank: int = setting(8, "rank of LoRA")
    learning_rate: float = setting(2e-3, "learning rate of LoRA")

    def check(self) -> None:
        if self.text:
            raise ValueError(f"--text must not be given, got {self.text}; this recipe trains on --chat")
        super().check()
        if self.rank < 1:
            raise ValueError(f"--rank must be at least 1, got {self.rank}")


class GateSFTTrainer(GateTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with parameter groups for gates."""


def conversations(path: str) -> Iterator[Conversation]:
    """
    Yield the conversations of a file, or questions about Python if `path` is empty.

    Raises:
        ValueError: if a line is not a conversation.
    """
    if not path:
        for name, topic in topics.items():
            # Skip the heading with its underline.
            paragraphs = [paragraph.strip() for paragraph in topic.split("\n\n")[1:] if paragraph.strip()]
            question = f"What does Python's language reference say about {name.replace('-', ' ')!r}?"
            yield [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "\n\n".join(paragraphs[:3]) or topic.strip()},
            ]
        return
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield checked(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}: line {number} must be a conversation, got {error!r}") from None


def checked(entry: Any) -> Conversation:
    """
    Return the messages of a line.

    Raises:
        KeyError, TypeError, ValueError: if the line is not a conversation that ends with an answer.
    """
    messages = [{"role": message["role"], "content": message["content"]} for message in entry["messages"]]
    if not all(isinstance(text, str) for message in messages for text in message.values()):
        raise TypeError("roles and contents must be strings")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be an answer with the role assistant")
    return messages


def split(settings: Settings) -> tuple[list[Conversation], list[Conversation]]:
    """
    Return training conversations and held-out conversations, a tenth of all.

    Held-out conversations that share a paragraph of an answer with training conversations are dropped.

    Raises:
        ValueError: if no held-out conversation is left.
    """
    shuffled = list(conversations(settings.chat))
    random.Random(0).shuffle(shuffled)
    count = len(shuffled) // 10
    training = shuffled[count:]
    known = {paragraph for messages in training for paragraph in paragraphs(messages)}
    held = [messages for messages in shuffled[:count] if known.isdisjoint(paragraphs(messages))]
    if not held:
        raise ValueError(
            f"--chat must have conversations to hold out, got {settings.chat!r} with {len(shuffled)} conversations; "
            "add conversations with different answers"
        )
    return training, held


def paragraphs(messages: Conversation) -> set[str]:
    """Return the paragraphs of the answer."""
    return set(messages[-1]["content"].split("\n\n"))


def held_out_answers(
    settings: Settings, dialogues: list[Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[HeldOut]:
    """
    Return the tokens of conversations, cut to the length. Only the answers' tokens are predicted.

    Raises:
        ValueError: if no question fits into the length.
    """
    sequences = []
    for messages in dialogues:
        tokens, prompt = (
            tokenizer.apply_chat_template(turns, add_generation_prompt=generation, return_dict=True)["input_ids"]
            for turns, generation in ((messages, False), (messages[:-1], True))
        )
        if len(prompt) < min(len(tokens), settings.length):
            sequences.append(HeldOut(torch.tensor(tokens[: settings.length]), given=len(prompt)))
    if not sequences:
        raise ValueError(f"--length must fit a held-out question, got {settings.length}; use a greater length")
    return sequences[: settings.evaluation_windows]


def main(flags: Sequence[str] | None = None) -> None:
    settings = read_flags(Settings, __doc__, flags)
    disable_progress_bar()
    with one_clear_line():
        one_process()
        open_output(settings)
        models = prepare(settings)
        training, held = split(settings)
        evaluation = held_out_answers(settings, held, AutoTokenizer.from_pretrained(models.control))
    dataset = Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]} for messages in training])

    def run(kind: str, seed: int, folder: Path) -> None:
        set_seed(seed)
        lora = LoraConfig(r=settings.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = GateSFTTrainer(
            AutoModelForCausalLM.from_pretrained(models[kind]),
            SFTConfig(**arguments(settings, folder, seed), max_length=settings.length, bf16=False, packing=False),
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(models[kind]),
            peft_config=gate_peft_config(lora) if kind == "gated" else lora,
            gate_learning_rate=settings.gate_learning_rate if kind == "gated" else None,
        )
        tune(trainer, evaluation, folder)

    run_all(settings, run)


if __name__ == "__main__":
    main()

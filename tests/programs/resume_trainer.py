"""
Train a gated checkpoint for 2 or 4 of 4 steps: `python resume_trainer.py CHECKPOINT OUTPUT STEPS CODE`.

4 steps resume from a state in OUTPUT if there is one. CODE is "package" or "carried".
"""

import importlib
import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


_, source, output, steps, code = sys.argv
if code == "package":
    importlib.import_module("modeling_gated")
last = get_last_checkpoint(output) if steps == "4" else None
model = AutoModelForCausalLM.from_pretrained(last or source, trust_remote_code=None if code == "package" else True)
expected = "modeling_gated" if code == "package" else "transformers_modules"
assert type(model).__module__.split(".")[0] == expected, type(model)
data = [{"input_ids": torch.arange(n, n + 12), "labels": torch.arange(n, n + 12)} for n in range(1, 17)]
arguments = TrainingArguments(
    output,
    max_steps=4,
    save_steps=2,
    per_device_train_batch_size=2,
    learning_rate=1e-2,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
    lr_scheduler_type="constant",
)
arguments.max_steps = int(steps)
Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=last)

"""What the recipes train and save with accelerate: a model's loss on windows of packed text, and its checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from modeling_gated.training.chunks import at_least_float32, sum_over_chunks
from modeling_gated.training.loop import Run


class WindowLoss(nn.Module):
    """
    A causal language model's mean loss on windows of text, with the logits of one chunk of tokens in memory. They are
    those of the output embeddings: what some families do with them then (Gemma 2, Cohere, Granite) is left out.

    Not torch's linear_cross_entropy: it needs torch 2.13, computes in float32 under autocast, and returns a bfloat16
    loss for bfloat16 weights. This module is what is sharded or replicated, so all that uses parameters happens in its
    forward; that of `lm_head` is checkpointed, since backward would else need every chunk's logits.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.chunk_size = chunk_size
        self._no_split_modules = model._no_split_modules  # FSDP's units

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """
        Args:
            windows: token ids [batch, length + 1]; the labels are the inputs shifted by one.
        """
        hidden = self.model.base_model(windows[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        labels = windows[:, 1:].flatten()
        return sum_over_chunks(self._summed_loss, hidden, labels, chunk_size=self.chunk_size) / len(labels)

    def _summed_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return functional.cross_entropy(at_least_float32(logits), labels, reduction="sum")


def load(path: str | Path, dtype: torch.dtype | str = torch.float32, **options: Any) -> PreTrainedModel:
    """A causal language model, whole in this process; accelerate shards what it prepares."""
    unset_hf_deepspeed_config()  # with which Transformers would shard it over all processes, by ZeRO-3
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let the model keep nothing of its layers for the backward pass but their inputs."""
    # Transformers renamed it after 5.16.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def save_model(run: Run, module: nn.Module, name: str, attribute: str = "model") -> None:
    """Save the module's model as OUTPUT/name, where it appears when it is complete."""
    weights = run.accelerator.get_state_dict(module)  # gathered from all processes
    if run.accelerator.is_main_process:
        model = getattr(run.accelerator.unwrap_model(module), attribute)
        # Gathered tied weights are copies of each other, and saved would both be: the first name is enough.
        names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
        prefixed = {key: key.removeprefix(f"{attribute}.") for key in weights if key.startswith(f"{attribute}.")}
        selected = {new: weights[key] for key, new in prefixed.items() if new in names}
        write_checkpoint(run, model, name, selected)
        shutil.rmtree(run.output / "state", ignore_errors=True)
    run.accelerator.wait_for_everyone()


def write_checkpoint(
    run: Run, model: PreTrainedModel, name: str, weights: dict[str, torch.Tensor] | None = None
) -> None:
    partial = run.output / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    AutoTokenizer.from_pretrained(run.tokenizer).save_pretrained(partial)
    partial.rename(run.output / name)

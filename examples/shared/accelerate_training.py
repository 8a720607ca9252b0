"""Training with accelerate: a model's loss on windows of packed text, and saving of checkpoints."""

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
    Mean loss of a causal language model on windows of text, with the logits of one chunk of tokens in memory.

    The logits are the outputs of the output embeddings. Scaling or capping of logits in some families (Gemma 2, Cohere,
    Granite) is not applied.

    torch's linear_cross_entropy is not used: it needs torch 2.13, computes in float32 under autocast, and returns a
    bfloat16 loss for bfloat16 weights. FSDP and DDP wrap this module, so all uses of parameters are in its forward. The
    forward of `lm_head` is checkpointed, because backward would otherwise need the logits of every chunk.

    Args:
        model: causal language model.
        chunk_size: number of tokens whose logits are held in memory at once.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.chunk_size = chunk_size
        self._no_split_modules = model._no_split_modules  # classes of FSDP units

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """
        Return the mean loss in nats per token.

        Args:
            windows: token ids [batch, length + 1]. Labels are the inputs shifted by one token.
        """
        hidden = self.model.base_model(windows[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        labels = windows[:, 1:].flatten()
        return sum_over_chunks(self._summed_loss, hidden, labels, chunk_size=self.chunk_size) / len(labels)

    def _summed_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        return functional.cross_entropy(at_least_float32(logits), labels, reduction="sum")


def load(path: str | Path, dtype: torch.dtype | str = torch.float32, **options: Any) -> PreTrainedModel:
    """Load a complete causal language model in this process. accelerate shards the model later."""
    unset_hf_deepspeed_config()  # otherwise Transformers shards the model by ZeRO-3 while loading
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Enable activation checkpointing: layers keep only their inputs for the backward pass."""
    # Transformers renamed the method after 5.16.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def save_model(run: Run, module: nn.Module, name: str, attribute: str = "model") -> None:
    """Save the module's model as OUTPUT/name. The folder gets its name when it is complete."""
    weights = run.accelerator.get_state_dict(module)  # gathered from all processes
    if run.accelerator.is_main_process:
        model = getattr(run.accelerator.unwrap_model(module), attribute)
        # Gathered tied weights are separate copies; save them under the first name only.
        names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
        prefixed = {key: key.removeprefix(f"{attribute}.") for key in weights if key.startswith(f"{attribute}.")}
        selected = {new: weights[key] for key, new in prefixed.items() if new in names}
        write_checkpoint(run, model, name, selected)
        shutil.rmtree(run.output / "state", ignore_errors=True)
    run.accelerator.wait_for_everyone()


def write_checkpoint(
    run: Run, model: PreTrainedModel, name: str, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Save a model with its tokenizer as OUTPUT/name, with `weights` instead of its own weights if given."""
    partial = run.output / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    AutoTokenizer.from_pretrained(run.tokenizer).save_pretrained(partial)
    partial.rename(run.output / name)

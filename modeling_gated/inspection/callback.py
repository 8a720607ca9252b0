"""The cheap meters while a model is trained."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from modeling_gated.configuration import GatedLlamaConfig, initial_gate_bias
from modeling_gated.errors import InspectionError
from modeling_gated.modeling_gated_llama import GATE_ACTIVATIONS

from .meters.activation_meters import MassiveActivations
from .meters.attention_meters import FirstTokenAttention
from .meters.gate_meters import GateDrift, GateScores
from .watching.inspecting import evaluation_mode, input_device, inspecting
from .watching.meter import Meter


logger = logging.get_logger(__name__)


class InspectionCallback(TrainerCallback):
    """
    Logs, every so many steps and when training begins, what a few sequences that stay the same show of a model:

    - `first_token_attention`, mean over queries, heads and layers (F-Attn);
    - `massive_activation`, the largest |hidden state| of a layer, mean over layers (M-Act);
    - of a gated model `gate_mean`, its mean gate, `gate_scale` included, and `gate_drift`, the mean of |gate - what it
      is in a new model|.

    They go where all of the trainer's logs go: `report_to`, `state.log_history`. Under FSDP and DeepSpeed every process
    takes part. If a measurement fails, a warning says why and training goes on.

    Args:
        trainer: the one whose model is measured and which logs; add the callback by `trainer.add_callback`.
        input_ids: token ids [batch, tokens], of one forward pass.
        attention_mask: [batch, tokens], if they are padded.
        every: steps between two measurements.

    ```python
    >>> trainer = Trainer(model, ...)
    >>> trainer.add_callback(InspectionCallback(trainer, input_ids, every=100))
    ```
    """

    def __init__(
        self,
        trainer: Trainer,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        every: int = 100,
    ) -> None:
        if every < 1:
            raise InspectionError(f"every must be at least 1, got {every}")
        if input_ids.ndim != 2 or input_ids.shape[1] < 2:
            raise InspectionError(
                f"input_ids must be [batch, tokens] with at least 2 tokens, got {list(input_ids.shape)}"
            )
        self.trainer, self.every = trainer, every
        self.input_ids, self.attention_mask = input_ids, attention_mask

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log(kwargs["model"], control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._log(kwargs["model"], control)

    def _log(self, model: Any, control: TrainerControl) -> None:
        try:
            measurements = measure(model, self.input_ids, self.attention_mask)
        except Exception as error:  # whatever it is, hours of training are not to end by it
            logger.warning(f"not measured: {error or type(error).__name__}")
            return
        # Logging takes it for done, and the trainer's own log of this step, with its loss, would not be written.
        should_log = control.should_log
        self.trainer.log(measurements)
        control.should_log = should_log


@torch.no_grad()
def measure(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> dict[str, float]:
    """
    Return the cheap meters of one forward pass, in evaluation mode meanwhile: what `InspectionCallback` logs.

    Args:
        model: a model of Transformers', or what PEFT, DDP or FSDP made of one.
        input_ids: token ids [batch, tokens].
        attention_mask: [batch, tokens], if they are padded.

    Raises:
        InspectionError: as `inspecting` does, and if there is no model of Transformers' inside.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        raise InspectionError(f"{type(model).__name__}: there is no model of Transformers' in it")
    first_token, maxima, gates = FirstTokenAttention(), MassiveActivations(), GateScores()
    meters: list[Meter] = [first_token, maxima, gates]
    config = inner.config
    drift = GateDrift(initial_gate(config)) if isinstance(config, GatedLlamaConfig) else None
    device = input_device(inner)
    mask = None if attention_mask is None else attention_mask.to(device)
    with evaluation_mode(model), _uncompiled(), inspecting(inner, *meters, *([drift] if drift else [])):
        model(input_ids=input_ids.to(device), attention_mask=mask, use_cache=False)
    measurements = {
        "first_token_attention": first_token.result().nanmean().item(),
        "massive_activation": maxima.result().mean_maximum,
    }
    positions = gates.result()
    if positions and drift:
        means = torch.cat([statistics.value.flatten() for statistics in positions.values()])
        measurements |= {"gate_mean": means.nanmean().item(), "gate_drift": drift.result()}
    return measurements


def _uncompiled() -> AbstractContextManager[Any]:
    """Run models uncompiled meanwhile. Nothing is compiled if nothing was, so that nothing is loaded."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def initial_gate(config: GatedLlamaConfig) -> float:
    """Return the value of a gate in a new or newly converted model: that of a zero input."""
    bias = initial_gate_bias(config.gate_init, config.gate_activation, config.gate_form) if config.gate_bias else 0.0
    return (GATE_ACTIVATIONS[config.gate_activation](torch.tensor(bias)) * config.gate_scale).item()

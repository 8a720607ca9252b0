"""A teacher's attention outputs and predictions as what a gated model learns from."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from modeling_gated.configuration import GatedLlamaConfig
from modeling_gated.gate_names import is_gate

from .chunks import at_least_float32, sum_over_chunks


@dataclass
class DistillationOutput(ModelOutput):
    """
    What a batch gives, each a float32 scalar (float64 of a float64 model).

    `loss` is attention_weight * `attention_loss` + kl_weight * `kl_loss`, and has a gradient. `attention_loss` is the
    mean over layers of the relative squared error of the attention block's output, ||student - teacher||² /
    ||teacher||², over all tokens; `kl_loss` the mean over tokens of KL(teacher || student), in nats. What has weight 0
    is not computed, and None.
    """

    loss: torch.Tensor | None = None
    attention_loss: torch.Tensor | None = None
    kl_loss: torch.Tensor | None = None


class Distillation(nn.Module):
    """
    Teaches a causal language model what another one of the same shape computes.

    The teacher is frozen, in evaluation mode and no part of the state dict. It shares every parameter with the student
    that both have, that the student does not train and that is equal in both. Under FSDP, and DeepSpeed's ZeRO-3, where
    each module's parameters are sharded on their own, use `share_weights=False`.

    Args:
        student: the model to train. Freeze what is not to be trained, before.
        teacher: by default the student's source: the student's weights as they are now, without gates.
        attention_weight: of the attention outputs' loss.
        kl_weight: of the predictions' loss.
        chunk_size: the tokens of whose logits there are any at a time.
        share_weights: whether the teacher's parameters are the student's, where that changes nothing.

    Raises:
        ValueError: if the two have different numbers of layers, hidden sizes or vocabularies, or nothing is to be
            learnt; if one of them is not a model of Transformers'; if there is no teacher and `ungated` refuses the
            student.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        *,
        attention_weight: float = 1.0,
        kl_weight: float = 1.0,
        chunk_size: int = 1024,
        share_weights: bool = True,
    ) -> None:
        super().__init__()
        for name, model in (("student", student), ("teacher", teacher)):
            if model is not None and not isinstance(model, PreTrainedModel):
                raise ValueError(
                    f"{name} must be a Transformers model, got {type(model).__name__}; PEFT has get_base_model()"
                )
        weights = {"attention_weight": attention_weight, "kl_weight": kl_weight}
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        if not any(weights.values()):
            raise ValueError("attention_weight=0 and kl_weight=0: there is nothing to learn")
        if teacher is None:
            teacher = ungated(student, share_weights=share_weights)
        else:
            for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
                ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
                if ours != theirs:
                    raise ValueError(f"{name}: the student has {ours}, the teacher {theirs}")
            if share_weights:
                share_frozen_parameters(student, teacher)
        self.student, self.teacher = student, teacher
        self.attention_weight, self.kl_weight, self.chunk_size = attention_weight, kl_weight, chunk_size
        for parameter in teacher.parameters():
            # Those that it shares are frozen already, and have to stay the student's to free.
            if parameter.requires_grad:
                parameter.requires_grad_(False)
        self._no_split_modules = student._no_split_modules  # FSDP's units
        self.train(student.training)
        self.register_state_dict_post_hook(_leave_teacher_out)
        self.register_load_state_dict_post_hook(_expect_no_teacher)

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> DistillationOutput:
        """
        Args:
            input_ids: [batch, seq].
            attention_mask: [batch, seq], 1 for tokens and 0 for padding, which counts for nothing.

        Raises:
            ValueError: if a parameter that the teacher shares has been unfrozen, or attention outputs are to be learnt
                from and have no gradient, as under reentrant gradient checkpointing.
        """
        if any(parameter.requires_grad for parameter in self.teacher.parameters()):
            raise ValueError("a parameter that the teacher shares with the student has been unfrozen")
        with torch.no_grad():
            teacher_hidden, expected_outputs = self._run(self.teacher, input_ids, attention_mask)
        hidden, outputs = self._run(self.student, input_ids, attention_mask)
        kept = None if attention_mask is None else attention_mask.bool()

        result = DistillationOutput()
        terms = []
        if self.attention_weight:
            if hidden.requires_grad and not any(output.requires_grad for output in outputs):
                raise ValueError(
                    "the attention outputs have no gradient: checkpoint with use_reentrant=False, and train something "
                    "that they depend on"
                )
            pairs = zip(outputs, expected_outputs, strict=True)
            errors = [_relative_error(_tokens(*pair[:1], kept), _tokens(*pair[1:], kept)) for pair in pairs]
            result.attention_loss = torch.stack(errors).mean()
            terms.append(self.attention_weight * result.attention_loss)
        if self.kl_weight:
            rows, expected_rows = _tokens(hidden, kept), _tokens(teacher_hidden, kept)
            total = sum_over_chunks(self._summed_kl, rows, expected_rows, chunk_size=self.chunk_size)
            result.kl_loss = total / max(1, len(rows))
            terms.append(self.kl_weight * result.kl_loss)
        result.loss = torch.stack(terms).sum()
        return result

    def _run(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return last hidden states and, if asked for, each layer's attention output, both [batch, seq, hidden]."""
        with _attention_outputs(model if self.attention_weight else None) as outputs:
            hidden = model.base_model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return hidden, outputs

    def _summed_kl(self, hidden: torch.Tensor, expected_hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = self.teacher.get_output_embeddings()(expected_hidden)
            teacher_log_probabilities = functional.log_softmax(at_least_float32(teacher_logits), dim=-1)
        logits = self.student.get_output_embeddings()(hidden)
        log_probabilities = functional.log_softmax(at_least_float32(logits), dim=-1)
        return functional.kl_div(log_probabilities, teacher_log_probabilities, reduction="sum", log_target=True)


def ungated(student: PreTrainedModel, *, share_weights: bool = True) -> PreTrainedModel:
    """
    Return a gated model without its gates: for a converted one, its source. In evaluation mode.

    Args:
        student: a gated causal language model, not wrapped by PEFT.
        share_weights: whether frozen parameters, and frozen ones only, are the student's own and not copies.

    Raises:
        ValueError: if the model is not gated, or has PEFT's layers, quantized weights, or layers on several devices.
    """
    for reason, holds in {
        "PEFT's layers": hasattr(student, "peft_config"),
        "quantized weights": getattr(student, "is_quantized", False),
        "layers on several devices": len(set((getattr(student, "hf_device_map", None) or {}).values())) > 1,
    }.items():
        if holds:
            raise ValueError(f"a model with {reason} needs a teacher of its own")
    config = deepcopy(student.config)
    if config.model_type != GatedLlamaConfig.model_type or not config.gate_position:
        raise ValueError(f"model_type={config.model_type!r}: a model without gates needs a teacher")
    config.gate_position = []
    with torch.device("meta"):
        model = type(student)._from_config(config, dtype=student.dtype)
    model.tie_weights()
    copies: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not is_gate(name):
            shared = share_weights and not parameter.requires_grad
            if id(parameter) not in copies:
                copies[id(parameter)] = (
                    parameter if shared else nn.Parameter(parameter.detach().clone(), requires_grad=False)
                )
            _set_parameter(model, name, copies[id(parameter)])
    for name, buffer in student.named_buffers():
        module, _, last = name.rpartition(".")
        persistent = last not in model.get_submodule(module)._non_persistent_buffers_set
        model.get_submodule(module).register_buffer(last, buffer.clone(), persistent=persistent)
    return model.eval()


def share_frozen_parameters(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """
    Let the teacher use the student's own parameters where it has equal ones that the student does not train.

    Returns:
        How many bytes both have in common then.
    """
    teacher_parameters = dict(teacher.named_parameters(remove_duplicate=False))
    shared: dict[int, int] = {}
    for name, parameter in student.named_parameters(remove_duplicate=False):
        teacher_parameter = teacher_parameters.get(name)
        if (
            teacher_parameter is None
            or parameter.requires_grad
            or teacher_parameter.dtype != parameter.dtype
            or teacher_parameter.device != parameter.device
        ):
            continue
        if teacher_parameter is parameter or torch.equal(teacher_parameter, parameter):
            _set_parameter(teacher, name, parameter)
            shared[id(parameter)] = parameter.numel() * parameter.element_size()
    return sum(shared.values())


def _leave_teacher_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}teacher.")]:
        del state_dict[name]


def _expect_no_teacher(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if "teacher" not in name.split(".")]


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, parameter)


@contextmanager
def _attention_outputs(model: PreTrainedModel | None) -> Iterator[list[torch.Tensor]]:
    """Give a list that the next forward pass fills with the outputs of the attention blocks, in the layers' order."""
    outputs: list[torch.Tensor] = []
    decoder: Any = None if model is None else model.base_model
    layers = [] if decoder is None else decoder.layers
    hooks = [layer.self_attn.register_forward_hook(lambda *call: outputs.append(call[-1][0])) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(states: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Return states [batch, seq, hidden] as [tokens, hidden], without padding."""
    return states.flatten(0, 1) if kept is None else states[kept]


def _relative_error(output: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    output, expected = at_least_float32(output), at_least_float32(expected)
    return (output - expected).square().sum() / expected.square().sum().clamp_min(torch.finfo(expected.dtype).tiny)

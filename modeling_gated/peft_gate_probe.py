"""
Adapters on gates that PEFT cannot train: left out of "all-linear", and an error where a config names them.

A method that rescales, rotates or decomposes a layer's weight gives NaN for a weight of 0, or never moves it. Instead
of a list of such methods, `probe` tries the config on a layer like the gate.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import wraps
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn

from .configuration import OPEN_GATE_WEIGHT
from .gate_names import GATE_NAMES
from .modeling_gated_llama import GatedLlamaGate


NEARLY_ZERO = 2.0**-30
_STEPS = 4
_LEAST_MOVE = 1e-6  # of a gate's logit: methods that train gates move it by 1e-4 and more
# Gradient of an adapter's parameters per gradient of a logit. Methods that train gates have 0.04 and more. PiSSA has
# 1e-6 and less: Adam moves its gates only after 4 to more than 16 steps.
_LEAST_GRADIENT = 1e-4
_MOST_ROWS = 512  # of the layer that is probed, and columns: orthogonal methods take minutes with 4,096
_TRAINED_ELSEWHERE = ("SHADOW", "TRAINABLE_TOKENS", "XLORA")  # methods whose targets are not linear layers
_FAILED = "trying it on a gate of shape"


@dataclass(frozen=True)
class GateLayer:
    """The parts of a gate that decide whether a config can train it, and the config's field that targets it."""

    rows: int
    columns: int
    weight: float  # number that fills the weight
    bias: float | None  # number that fills the bias, or None without a bias
    field: str = "target_modules"  # or "target_parameters"


def refuse_untrainable_gates(tuners_utils: ModuleType) -> None:
    """
    Let PEFT's tuners look at the gates of a gated model before they put adapters into it for training.

    Args:
        tuners_utils: `peft.tuners.tuners_utils`.
    """
    tuner = tuners_utils.BaseTuner
    initialize, inject = tuner.__init__, tuner.inject_adapter

    @wraps(initialize)  # before hooks of some tuners, which list the layers of "all-linear" themselves
    def checked_initialize(self: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        config = peft_config.get(adapter_name) if isinstance(peft_config, dict) else peft_config
        check_gates(type(self), model, config)
        return initialize(self, model, peft_config, adapter_name, *args, **kwargs)

    @wraps(inject)  # for a second adapter
    def checked_inject(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any):
        check_gates(type(self), model, self.peft_config[adapter_name])
        return inject(self, model, adapter_name, *args, **kwargs)

    tuner.__init__, tuner.inject_adapter = checked_initialize, checked_inject


def check_gates(tuner: type, model: nn.Module, config: Any) -> None:
    """
    Take gates that a PEFT config cannot train out of its targets, with a warning, if these are "all-linear".

    Args:
        tuner: the class that is going to put the adapter into `model`.
        model: a model with or without gates.
        config: the adapter's config. Its `target_modules` become a set of names if gates are taken out.

    Raises:
        ValueError: if the config names such gates itself.
    """
    targets = getattr(config, "target_modules", None)
    parameters = getattr(config, "target_parameters", None)
    if not (targets or parameters) or getattr(config, "inference_mode", False):
        return
    if config.peft_type.value in _TRAINED_ELSEWHERE:
        return
    is_all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    reasons: dict[str, str] = {}
    for gate, layers in _nearly_zero_gates(model, config, is_all_linear).items():
        name, layer = next(iter(layers.items()))
        if (reason := probe(tuner, config, name, gate, _public_attributes(layer))) is None:
            continue
        if not (is_all_linear and gate.field == "target_modules"):
            raise ValueError(
                f"{gate.field} must not include {name!r} with {_method(config)}: {reason}. Leave the gates out of "
                f"{gate.field}, or train them in full: modeling_gated.training.gate_peft_config(base, gates='full')"
            )
        reasons |= dict.fromkeys(layers, reason)
    if not reasons:
        return
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    name, reason = next(iter(reasons.items()))
    every_linear: Any = _maybe_include_all_linear_layers(config, model)
    # With gates in full, PEFT counts the layers in its wrapper of a gate as layers of their own.
    inside = tuple(f"{name}." for name in reasons)
    left_out = {name for name in every_linear.target_modules if name in reasons or name.startswith(inside)}
    config.target_modules = every_linear.target_modules - left_out
    warnings.warn(
        f"{_method(config)} leaves {len(reasons)} gates out of target_modules='all-linear', such as {name!r}: {reason}."
        " To train the gates in full, use modeling_gated.training.gate_peft_config(base, gates='full')",
        stacklevel=4,
    )


def probe(
    tuner: type, config: Any, name: str, gate: GateLayer, attributes: Mapping[str, Any] = MappingProxyType({})
) -> str | None:
    """
    Return why a PEFT config cannot train a gate, or None if it can, after some steps on a layer like the gate.

    Args:
        tuner: the class that puts the adapter in.
        config: the adapter's config. It is not changed.
        name: the gate's name in its model.
        gate: shape and numbers of the gate's layer, and the config's field that targets it.
        attributes: attributes that the layer gets. CorDA, for one, keeps its statistics in an attribute.
    """
    reason = None
    for rows, columns in dict.fromkeys([(_halved(gate.rows), _halved(gate.columns)), (gate.rows, gate.columns)]):
        reason = _try(tuner, config, name, replace(gate, rows=rows, columns=columns), attributes)
        if reason is None or not reason.startswith(_FAILED):  # a smaller layer may not fit the config's block sizes
            break
    return reason


def _halved(size: int) -> int:
    while size > _MOST_ROWS and size % 2 == 0:
        size //= 2
    return size


def _try(tuner: type, config: Any, name: str, gate: GateLayer, attributes: Mapping[str, Any]) -> str | None:
    # The CPU whatever torch's default device is.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the generators of GPUs, too
        try:
            model = _OneGate(name, gate, attributes)
            return _trained(tuner, _for_gate(config, name, gate.field), model, gate.weight)
        except Exception as error:  # any: the config may not fit the layer's shape, or need data of its own
            message = " ".join(str(error).split()).rstrip(".")
            return f"{_FAILED} [{gate.rows}, {gate.columns}] failed: {type(error).__name__}: {message}"


def _trained(tuner: type, config: Any, model: "_OneGate", value: float) -> str | None:
    adapted = tuner(model, config, "default").train()
    # float32 whatever torch's default dtype is
    inputs = torch.randn(4, 4, model.columns, dtype=torch.float32)
    slopes = torch.randn(4, 4, model.rows, dtype=torch.float32)
    keywords = {"task_ids": torch.zeros(4, dtype=torch.long)} if config.peft_type.value == "POLY" else {}
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    per_logit = 1e-3 / slopes.numel()  # gradients as small as in a model
    before = adapted(inputs, **keywords).detach()
    logits, gradient = before, 0.0
    for step in range(_STEPS):
        if not torch.isfinite(logits).all():
            return f"it divides by the norm of a weight that is {value:g}, which gives NaN"
        optimizer.zero_grad()
        (adapted(inputs, **keywords) * slopes).sum().mul(per_logit).backward()
        if step == 0:
            gradients = [parameter.grad.abs().max().item() for parameter in parameters if parameter.grad is not None]
            gradient = max(gradients, default=0.0) / per_logit
        optimizer.step()
        logits = adapted(inputs, **keywords).detach()
    if gradient < _LEAST_GRADIENT or (logits - before).abs().max() < _LEAST_MOVE:
        return f"it starts from, scales or turns a weight that is {value:g}, and moves the gates late or never"
    return None


class _OneGate(nn.Module):
    """A layer of a gate's shape, under the gate's name, whose weight is one number, as is its bias."""

    def __init__(self, name: str, gate: GateLayer, attributes: Mapping[str, Any]):
        super().__init__()
        self.path, self.rows, self.columns = name, gate.rows, gate.columns
        *parents, last = name.split(".")
        parent: nn.Module = self
        for child in parents:
            parent.add_module(child, nn.Module())
            parent = parent.get_submodule(child)
        # GLoRA refuses the gates' class
        layer = GatedLlamaGate(gate.columns, gate.rows, bias=gate.bias is not None, device="cpu", dtype=torch.float32)
        nn.init.constant_(layer.weight, gate.weight)
        if gate.bias is not None:
            nn.init.constant_(layer.bias, gate.bias)
        vars(layer).update(attributes)
        parent.add_module(last, layer)

    def forward(self, inputs: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return self.get_submodule(self.path)(inputs, **keywords)


def _public_attributes(layer: nn.Module) -> dict[str, Any]:
    """Return attributes that a linear layer does not have by itself, without functions such as accelerate's forward."""
    known = vars(nn.Linear(1, 1, device="meta"))
    extra = {name: value for name, value in vars(layer).items() if name not in known and not name.startswith("_")}
    return {name: value for name, value in extra.items() if not callable(value)}


def _for_gate(config: Any, name: str, field: str) -> Any:
    """Return a copy of a config that targets one gate alone, and trains nothing but its adapter."""
    copied = deepcopy(config)
    copied.target_modules = {name} if field == "target_modules" else []
    if hasattr(copied, "feedforward_modules"):  # IA3's, which have to be among the targets
        named = copied.feedforward_modules or []
        is_feedforward = not isinstance(named, str) and any(f".{name}".endswith(f".{end}") for end in named)
        copied.feedforward_modules = {name} if is_feedforward else set()
    for unused in (
        *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters"),
        *("layer_replication", "trainable_token_indices"),
        "alora_invocation_tokens",  # without these tokens in the input, aLoRA's layers do nothing
    ):
        if getattr(copied, unused, None):
            setattr(copied, unused, None)
    if field == "target_parameters":
        copied.target_parameters = [f"{name}.weight"]
    if hasattr(copied, "bias") and isinstance(copied.bias, str):
        copied.bias = "none"
    return copied


def _nearly_zero_gates(model: nn.Module, config: Any, is_all_linear: bool) -> dict[GateLayer, dict[str, nn.Module]]:
    """Return targeted gates with a row that is 0 or nearly 0: their layers, by name, in groups of equal ones."""
    from peft.tuners.tuners_utils import check_target_module_exists

    matched = config
    if is_all_linear:
        matched = deepcopy(config)
        matched.target_modules = set(GATE_NAMES)
    parameters = tuple(f".{name}" for name in getattr(config, "target_parameters", None) or ())
    groups: dict[GateLayer, dict[str, nn.Module]] = defaultdict(dict)
    for parent, attention in model.named_modules():
        if type(attention).__name__ != "GatedLlamaAttention":  # by name: a checkpoint's own code has another class
            continue
        for child, layer in attention.named_children():
            name = f"{parent}.{child}"
            if child not in GATE_NAMES:
                continue
            fields = []
            if matched.target_modules and check_target_module_exists(matched, name):
                fields.append("target_modules")
            if f".{name}.weight".endswith(parameters):
                fields.append("target_parameters")
            if not fields:
                continue
            layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            value = _smallest_row(layer)
            if value < NEARLY_ZERO:
                for field in fields:
                    gate = GateLayer(layer.out_features, layer.in_features, value, _bias(layer), field)
                    groups[gate][name] = layer
    return groups


@torch.no_grad()
def _smallest_row(layer: nn.Module) -> float:
    """Return the largest |number| of the row that has the smallest one; of weights without values, a new gate's."""
    from peft.utils.integrations import dequantize_module_weight

    if getattr(layer, "weight", None) is None and not hasattr(layer, "W_q"):  # GPTQ and others: no new gate
        return float("inf")
    weight = dequantize_module_weight(layer)
    if weight.is_meta or not weight.numel():  # sharded by ZeRO-3
        return OPEN_GATE_WEIGHT
    if not weight.is_floating_point():  # quantized in a way that PEFT does not know
        return float("inf")
    return weight.float().abs().amax(dim=1).min().item()


@torch.no_grad()
def _bias(layer: nn.Module) -> float | None:
    """Return None without a bias, 0 for a bias with an element that is nearly 0, otherwise 1."""
    bias: Any = layer.bias
    if bias is None or bias.is_meta or not bias.numel():
        return None if bias is None else 1.0
    return 0.0 if bias.abs().min() < NEARLY_ZERO else 1.0


def _method(config: Any) -> str:
    """Return a method's name, with the variants of LoRA that decide what it does with a weight."""
    details = []
    if getattr(config, "use_dora", False):
        details.append("use_dora=True")
    initialization = getattr(config, "init_lora_weights", True)
    if not isinstance(initialization, bool):
        details.append(f"init_lora_weights={initialization!r}")
    return config.peft_type.value + (f" ({', '.join(details)})" if details else "")

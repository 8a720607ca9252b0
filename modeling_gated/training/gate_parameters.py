"""Gate parameters of a model, and their settings in an optimizer and in PEFT."""

from typing import Any

from torch import nn

from modeling_gated.gate_names import GATE_NAMES, is_gate


# Those that Trainer doesn't decay.
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def gate_param_groups(
    model: nn.Module, lr: float, gate_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """
    Return the groups of a model's trainable parameters for an optimizer, gates with a learning rate of their own.

    Norms and biases are not decayed, as in `Trainer`, and neither are the gates' biases, nor the weights of gates that
    are independent of the input, which are what biases are elsewhere: decay would pull gates to one half, not to where
    they started. The model may be wrapped by PEFT, DDP or FSDP.

    Args:
        model: the model, gated or not.
        lr: the learning rate of all but the gates.
        gate_lr: the gates' learning rate; `lr` if not given.
        weight_decay: of all weights but those above.

    Returns:
        Up to four groups, none of them empty: `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: if nothing is trainable, or `gate_lr` is given and no gate is.

    ```python
    >>> optimizer = torch.optim.AdamW(gate_param_groups(model, lr=2e-5, gate_lr=1e-3, weight_decay=0.1))
    ```
    """
    # Imported here: it brings Trainer's dependencies along.
    from transformers.trainer_pt_utils import get_parameter_names

    decayed_names = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("none of the model's parameters requires a gradient")
    decayed = [parameter for name, parameter in trainable if name in decayed_names]
    undecayed = [parameter for name, parameter in trainable if name not in decayed_names]
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": undecayed, "lr": lr, "weight_decay": 0.0},
    ]
    return separate_gates(groups, model, gate_lr)


def separate_gates(groups: list[dict[str, Any]], model: nn.Module, gate_lr: float | None) -> list[dict[str, Any]]:
    """
    Return an optimizer's groups with the gates' parameters in separate groups.

    These come last and have all other values of the groups that the parameters were in.

    Args:
        groups: of parameters of the model.
        model: the model.
        gate_lr: the gates' learning rate; that of the groups if None.

    Raises:
        ValueError: if `gate_lr` is given and no gate is in a group.
    """
    gates = {id(parameter): parameter for name, parameter in model.named_parameters() if is_gate(name)}
    biases = {id(parameter) for parameter in _gate_biases(model)}
    own_lr = {} if gate_lr is None else {"lr": gate_lr}
    base_groups, gate_groups = [], []
    for group in groups:
        base = [parameter for parameter in group["params"] if id(parameter) not in gates]
        gate_weights = [parameter for parameter in group["params"] if id(parameter) in gates.keys() - biases]
        gate_biases = [parameter for parameter in group["params"] if id(parameter) in biases]
        base_groups.append({**group, "params": base})
        gate_groups.append({**group, **own_lr, "params": gate_weights})
        gate_groups.append({**group, **own_lr, "params": gate_biases, "weight_decay": 0.0})
    gate_groups = [group for group in gate_groups if group["params"]]
    if gate_lr is not None and not gate_groups:
        reason = "its gates do not require gradients" if gates else f"it has no {', '.join(sorted(GATE_NAMES))}"
        raise ValueError(f"gate_lr={gate_lr}: the model has no gate to train: {reason}")
    return [group for group in base_groups if group["params"]] + gate_groups


def _gate_biases(model: nn.Module) -> list[nn.Parameter]:
    """Return the gates' biases, and the weights of input-independent gates, which act as biases."""
    biases = []
    for name, module in model.named_modules():
        if is_gate(name):
            constant_input = getattr(module, "in_features", None) == 1
            parameters = module.named_parameters(recurse=False)
            biases += [parameter for key, parameter in parameters if key == "bias" or constant_input]
    return biases

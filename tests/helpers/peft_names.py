"""The names of parameters, as they are without PEFT around them."""

from torch import nn


def gate_names(model: nn.Module, names: tuple[str, ...] = ("g_proj",)) -> set[str]:
    """The gates' parameters' names in a model that is not PEFT's."""
    return {name for name, _ in model.named_parameters() if name.split(".")[-2] in names}


def unwrapped(name: str, *parts: str) -> str:
    """A trained copy's parameter's name in the model that is not PEFT's."""
    for prefix in (*parts, "default."):
        name = name.replace(prefix, "")
    return name.removeprefix("base_model.model.")

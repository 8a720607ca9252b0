"""Additions to accelerate and Trainer: an error or a warning where gates or kernels would be missing without a word."""

from types import ModuleType
from typing import Any, NoReturn

from transformers.utils import logging
from wrapt import wrap_function_wrapper

from .configuration import GatedLlamaConfig


logger = logging.get_logger(__name__)


def refuse_megatron(plugin: ModuleType) -> None:
    """
    Let accelerate's Megatron-LM refuse gated models, which it would train as a Llama without gates.

    It takes the first entry of its table that is part of the model type, and `llama` is part of `gated_llama`.

    Args:
        plugin: `accelerate.utils.dataclasses`.
    """

    def refuse(plugin: Any, model: Any, batch_data: Any) -> NoReturn:
        raise ValueError(
            "Megatron-LM has no attention output gates, so accelerate would train a Llama without gates; use FSDP or "
            "DeepSpeed"
        )

    parsers = getattr(plugin, "MODEL_CONFIGS_TO_MEGATRON_PARSERS", None)
    if parsers is None:  # another version of accelerate
        return
    other_parsers = dict(parsers)
    parsers.clear()
    parsers.update({GatedLlamaConfig.model_type: refuse} | other_parsers)


def warn_about_liger(liger: ModuleType) -> None:
    """
    Let Trainer's `use_liger_kernel` warn that Liger knows no gated model; it would leave it as it is.

    Args:
        liger: `transformers.integrations.liger`, or `transformers.trainer`, which has the function, too.
    """

    def apply(function: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if getattr(getattr(model, "config", None), "model_type", None) == GatedLlamaConfig.model_type:
            logger.warning_once("use_liger_kernel has no effect: Liger has no kernels for gated_llama")
        return function(*args, **kwargs)

    if hasattr(liger, "apply_liger_kernel"):
        wrap_function_wrapper(liger, "apply_liger_kernel", apply)

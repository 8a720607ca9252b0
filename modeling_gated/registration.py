"""Making Transformers' Auto classes, and PEFT once it is imported, know `gated_llama`."""

from types import ModuleType

from transformers import AutoConfig
from wrapt import register_post_import_hook

# Importing the model registers its classes with their Auto classes, as it does where it is carried by a checkpoint.
from . import modeling_gated_llama  # noqa: F401
from .configuration import GatedLlamaConfig


def add_default_target_modules(constants: ModuleType) -> None:
    """
    Let PEFT's methods target in a gated model what they target in a Llama where a config names no `target_modules`.

    Args:
        constants: `peft.utils.constants`, whose tables PEFT has no other way to add to.
    """
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault(GatedLlamaConfig.model_type, table["llama"])


AutoConfig.register(GatedLlamaConfig.model_type, GatedLlamaConfig, exist_ok=True)
register_post_import_hook(add_default_target_modules, "peft.utils.constants")

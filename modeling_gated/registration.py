"""Making Transformers' Auto classes know `gated_llama`."""

from transformers import AutoConfig

# Importing the model registers its classes with their Auto classes, as it does where it is carried by a checkpoint.
from . import modeling_gated_llama  # noqa: F401
from .configuration import GatedLlamaConfig


AutoConfig.register(GatedLlamaConfig.model_type, GatedLlamaConfig, exist_ok=True)

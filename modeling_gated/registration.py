"""Making Transformers' Auto classes, and PEFT once it is imported, know `gated_llama`."""

from transformers import AutoConfig
from wrapt import register_post_import_hook

# Importing the model registers its classes with their Auto classes, as it does where it is carried by a checkpoint.
from . import modeling_gated_llama  # noqa: F401
from .configuration import GatedLlamaConfig
from .lookups import use_response_templates_of_sources
from .peft_additions import (
    add_adaption_prompt,
    add_default_target_modules,
    refuse_averaging_gates,
    refuse_hotswapping_gates,
    refuse_losing_the_cache,
    refuse_losing_the_cache_of_shadows,
    use_target_modules_of_sources,
)
from .peft_gate_probe import refuse_untrainable_gates
from .training_additions import refuse_megatron, warn_about_liger


AutoConfig.register(GatedLlamaConfig.model_type, GatedLlamaConfig, exist_ok=True)
register_post_import_hook(use_response_templates_of_sources, "transformers.cli.serving.utils")
register_post_import_hook(add_default_target_modules, "peft.utils.constants")
register_post_import_hook(add_adaption_prompt, "peft.tuners.adaption_prompt.config")
register_post_import_hook(refuse_hotswapping_gates, "peft.utils.hotswap")
register_post_import_hook(refuse_averaging_gates, "peft.tuners.ln_tuning.model")
register_post_import_hook(use_target_modules_of_sources, "peft.tuners.tuners_utils")
register_post_import_hook(refuse_untrainable_gates, "peft.tuners.tuners_utils")
register_post_import_hook(refuse_losing_the_cache, "peft.peft_model")
register_post_import_hook(refuse_losing_the_cache_of_shadows, "peft.tuners.shadow.model")
register_post_import_hook(refuse_megatron, "accelerate.utils.dataclasses")
register_post_import_hook(warn_about_liger, "transformers.trainer")

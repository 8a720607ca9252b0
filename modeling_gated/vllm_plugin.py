"""Entry point with which vLLM serves `gated_llama` by this package, without `trust_remote_code`."""

from typing import Any

from .modeling_gated_llama import GatedLlamaForCausalLM


def register() -> None:
    """
    Let vLLM's Transformers backend run the model; importing this package has told the Auto classes of it. vLLM calls it
    (group `vllm.general_plugins`) in each of its processes, more than once in some.
    """
    from vllm import ModelRegistry

    registry: Any = ModelRegistry
    name = GatedLlamaForCausalLM.__name__
    if name not in registry.get_supported_archs():
        registry.register_model(name, "vllm.model_executor.models.transformers:TransformersForCausalLM")

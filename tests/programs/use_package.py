"""Check that importing the package registers its model type with Transformers."""

import transformers

import modeling_gated


assert isinstance(transformers.AutoConfig.for_model("gated_llama"), modeling_gated.GatedLlamaConfig)

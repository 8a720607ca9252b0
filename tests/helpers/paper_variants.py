"""Tiny configs of all the variants that examples/benchmarks/variants.py lists."""

import torch

from examples.benchmarks.variants import VARIANTS, equal_parameters
from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from tests.helpers.tiny_configs import TINY


SIZES = TINY | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "pad_token_id": 0}
CONFIGS = {
    name: GatedLlamaConfig(**SIZES | variant.fields)
    for name, variant in (VARIANTS | equal_parameters(GatedLlamaConfig(**SIZES))).items()
}


def random_model(name: str) -> GatedLlamaForCausalLM:
    """In evaluation mode, with every parameter off its start, gates that differ between tokens and heads."""
    torch.manual_seed(0)
    model = GatedLlamaForCausalLM(CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model

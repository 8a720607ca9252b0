"""Products of float32 models in bfloat16, which some CPUs compute twice as fast."""

import torch


def has_bfloat16_products() -> bool:
    """Whether this machine's CPU has instructions for them; without any, they take far longer than float32's."""
    # An older PyTorch cannot say.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def bfloat16_products(wanted: bool) -> torch.autocast:
    """Inside this context a model on a CPU multiplies in bfloat16, and does all else in its dtype, if it is wanted."""
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted)

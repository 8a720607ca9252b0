"""Products of float32 models in bfloat16, which some CPUs compute twice as fast."""

from collections.abc import Mapping
from typing import Any

import torch


def has_bfloat16_matmuls() -> bool:
    """Whether this machine's CPU has instructions for them; without any, they take far longer than float32's."""
    # An older PyTorch cannot say.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def matmuls_in_bfloat16(wanted: bool) -> torch.autocast:
    """
    Inside this context a float32 model on a CPU multiplies in bfloat16, if it is wanted. Products, and what follows
    from them up to the next norm or sum with float32, are bfloat16; weights and hidden states are not.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted)

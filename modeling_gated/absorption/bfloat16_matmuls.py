"""bfloat16 matmuls of float32 models, which are twice as fast on some CPUs."""

from collections.abc import Mapping
from typing import Any

import torch


def has_bfloat16_matmuls() -> bool:
    """
    Return whether this machine's CPU has instructions for bfloat16 matmuls (AVX512-BF16 or AMX-BF16).

    Without these instructions bfloat16 matmuls are far slower than float32 matmuls.
    """
    # Older PyTorch has no get_capabilities.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def matmuls_in_bfloat16(wanted: bool) -> torch.autocast:
    """
    Return a context in which a float32 model on a CPU computes its matmuls in bfloat16.

    Outputs of matmuls are bfloat16 up to the next norm, or the next sum with a float32 tensor. Weights and hidden
    states stay float32.

    Args:
        wanted: enable bfloat16 matmuls; otherwise the context changes nothing.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted)

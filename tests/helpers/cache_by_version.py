"""The KV cache as each version of Transformers names it: `past_key_values` before 5.24, `cache` since."""

from typing import Any

import transformers
from packaging.version import Version
from transformers import Cache


NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def with_cache(cache: Cache | None) -> dict[str, Any]:
    """The keyword argument that gives a model, or `generate`, a cache."""
    return {NAME: cache}


def cache_of(output: Any) -> Cache:
    """The cache in the output of a model or of `generate`."""
    return output[NAME]

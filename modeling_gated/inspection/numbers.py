"""Tensors as numbers that JSON can hold, and their mean."""

import math
from typing import Any

import torch


Numbers = list[float | None]


def numbers(tensor: torch.Tensor) -> Any:
    """Return a tensor as lists, with None for what is not finite."""
    return _finite(tensor.tolist())


def _finite(nested: Any) -> Any:
    return [_finite(element) for element in nested] if isinstance(nested, list) else finite_or_none(nested)


def finite_or_none(number: float) -> float | None:
    """Return the number, or None if it is not finite."""
    return number if math.isfinite(number) else None


def mean_of(nested: Any) -> float | None:
    """Return the mean of all numbers in lists of lists; None without any."""
    flat = torch.tensor([number for number in _flat(nested) if number is not None], dtype=torch.float64)
    return flat.mean().item() if len(flat) else None


def _flat(nested: Any) -> list[Any]:
    if isinstance(nested, list):
        return [number for element in nested for number in _flat(element)]
    return [nested]

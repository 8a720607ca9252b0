"""Comparing tensors that were computed in two ways."""

import torch


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits, which weights elsewhere in memory may move."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def assert_same_training(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """
    Weights of two runs of one training. Last bits, which memory's alignment may move, change a step by its millionth,
    but for the few weights whose gradient is nothing but rounding. A step too few or too many changes all of them.
    """
    assert found.keys() == expected.keys()
    differing = sum(
        (~torch.isclose(found[name].float(), tensor.float(), rtol=1e-5, atol=1e-6)).sum().item()
        for name, tensor in expected.items()
    )
    assert differing <= 0.01 * sum(tensor.numel() for tensor in expected.values())

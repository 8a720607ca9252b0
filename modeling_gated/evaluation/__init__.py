"""How well a model uses a long context."""

from .position_loss import loss_by_position


__all__ = ["loss_by_position"]

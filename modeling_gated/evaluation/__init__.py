"""How well a model uses a long context."""

from .context import ContextEvaluation, PositionLoss, TaskScore, evaluate_context
from .errors import EvaluationError
from .position_loss import loss_by_position
from .tasks import TASKS


__all__ = [
    "TASKS",
    "ContextEvaluation",
    "EvaluationError",
    "PositionLoss",
    "TaskScore",
    "evaluate_context",
    "loss_by_position",
]

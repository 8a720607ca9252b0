"""Evaluation of long contexts."""

from modeling_gated.errors import EvaluationError

from .context import ContextEvaluation, PositionLoss, TaskScore, evaluate_context
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

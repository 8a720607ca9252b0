"""Gates in Transformers' `Trainer`, and in what is derived from it."""

from typing import Any

import torch

from .float32_states import keep_float32_states
from .gate_parameters import separate_gates


class GateTrainerMixin:
    """
    Gives a trainer groups of parameters that suit gates: `gate_param_groups`, for whatever optimizer it makes.

    To be put before any subclass of `transformers.Trainer`, TRL's among them:

    ```python
    >>> class GateTrainer(GateTrainerMixin, Trainer): ...
    >>> trainer = GateTrainer(model, arguments, train_dataset=dataset, gate_learning_rate=1e-3)
    ```

    An optimizer that is handed to the trainer, or made by DeepSpeed from its own configuration, is left as it is.

    Args:
        gate_learning_rate: the gates'; that of the arguments if not given. The schedule scales both alike.
        float32_states: whether the optimizer keeps float32 copies of weights that aren't (`keep_float32_states`).
        args, kwargs: the trainer's.

    Raises:
        ValueError: when training begins, if `gate_learning_rate` is given and the model has no gate to train.
    """

    def __init__(
        self, *args: Any, gate_learning_rate: float | None = None, float32_states: bool = False, **kwargs: Any
    ) -> None:
        self.gate_learning_rate = gate_learning_rate
        self.float32_states = float32_states
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the trainer's optimizer, its gates in groups of their own."""
        trainer: Any = super()
        if getattr(self, "optimizer", None) is not None:
            return trainer.create_optimizer(model)
        optimizer = trainer.create_optimizer(model)
        whole: Any = getattr(self, "model", None) if model is None else model
        optimizer.param_groups[:] = separate_gates(optimizer.param_groups, whole, self.gate_learning_rate)
        return keep_float32_states(optimizer) if self.float32_states else optimizer

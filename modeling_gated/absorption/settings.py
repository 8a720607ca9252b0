"""Settings of the removal of attention sinks."""

from dataclasses import dataclass

from modeling_gated.defaults import DISTILL_TOKENS, SAMPLE_TOKENS, SEED
from modeling_gated.errors import AbsorptionError


@dataclass(frozen=True)
class AbsorptionSettings:
    """
    Settings of `absorb_checkpoint`.

    Attributes:
        distill_tokens: number of tokens to distil on.
        sample_tokens: number of tokens to sample from the source model for distillation, half of them chats.
        calibration_tokens: number of tokens of calibration data, on which gates are fitted.
        window_tokens: length of a window in tokens.
        long_window_tokens: length of a long window in tokens. If it is more than `window_tokens`, some batches are one
            long window, so that about half of all tokens are in long windows.
        batch_size: number of windows per batch.
        refinement_epochs: number of passes over the calibration data that train each attention block.
        learning_rate: learning rate of attention projections and norms in distillation.
        gate_learning_rate: learning rate of gates in distillation.
        sink_weight: weight of attention to sinks in the losses of fitting and distillation.
        hidden_weight: weight of hidden states above `hidden_limit` in the loss of distillation.
        hidden_limit: largest |hidden state| without a penalty, unless half of the largest of the source model's other
            tokens is more.
        warmup_steps: number of distillation steps with a rising learning rate.
        save_every: number of distillation steps between saved states.
        evaluate_every: number of distillation steps between evaluations on validation text.
        patience: number of evaluations in a row without a lower loss that end the distillation.
        measured_windows: number of held-out windows of 512 tokens per text in the comparison. There are a quarter as
            many windows of 2,048 tokens, and a sixteenth, rounded down, at the model's maximum length.
        seed: random seed of windows and samples.
        removes_writers: remove the neurons that write massive activations. Ablations turn this step and the following
            steps off.
        edits_keys: remove the direction of sinks from keys.
        edits_gates: fit gates.
        trains_gates: train gates in distillation.
    """

    distill_tokens: int = DISTILL_TOKENS
    sample_tokens: int = SAMPLE_TOKENS
    calibration_tokens: int = 98_304
    window_tokens: int = 512
    long_window_tokens: int = 2048
    batch_size: int = 1
    refinement_epochs: int = 4
    learning_rate: float = 1.5e-4
    gate_learning_rate: float = 1e-3
    sink_weight: float = 1.0
    hidden_weight: float = 1.0
    hidden_limit: float = 800.0
    warmup_steps: int = 10
    save_every: int = 50
    evaluate_every: int = 25
    patience: int = 3
    measured_windows: int = 16
    seed: int = SEED
    removes_writers: bool = True
    edits_keys: bool = True
    edits_gates: bool = True
    trains_gates: bool = True

    def __post_init__(self) -> None:
        """
        Raises:
            AbsorptionError: if a number is too small, or `seed` is not a seed of torch.
        """
        least = {"distill_tokens": 0, "sample_tokens": 0, "window_tokens": 64, "batch_size": 1, "refinement_epochs": 0}
        least |= {"calibration_tokens": self.window_tokens, "save_every": 1, "evaluate_every": 1, "patience": 1}
        least |= {"measured_windows": 1, "long_window_tokens": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise AbsorptionError(f"{name} must be at least {number}, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**64:  # range of torch.manual_seed
            raise AbsorptionError(f"seed must be at least -2**63 and less than 2**64, got {self.seed}")
        for name in ("learning_rate", "gate_learning_rate", "hidden_limit"):
            if not getattr(self, name) > 0:
                raise AbsorptionError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("sink_weight", "hidden_weight"):
            if not getattr(self, name) >= 0:
                raise AbsorptionError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        """Return the maximum number of distillation steps."""
        return self.batches(self.distill_tokens)

    @property
    def length(self) -> int:
        """Return `window_tokens`, under the name that a training stage expects."""
        return self.window_tokens

    @property
    def batches_per_long(self) -> int:
        """Return n if every n-th batch is a long window, or 0 without long windows."""
        if self.long_window_tokens <= self.window_tokens:
            return 0
        return 1 + max(1, round(self.long_window_tokens / (self.window_tokens * self.batch_size)))

    def tokens(self, batches: int) -> int:
        """Return the number of tokens in the first batches, long windows included."""
        long = batches // self.batches_per_long if self.batches_per_long else 0
        return (batches - long) * self.window_tokens * self.batch_size + long * self.long_window_tokens

    def batches(self, tokens: int) -> int:
        """Return the largest number of batches with at most so many tokens."""
        per_round = self.batches_per_long or 1
        rounds, left = divmod(tokens, self.tokens(per_round))
        return rounds * per_round + min(per_round - 1, left // self.tokens(1))

"""What absorbing sinks can be told."""

from dataclasses import dataclass

from modeling_gated.defaults import DISTILL_TOKENS, SAMPLE_TOKENS, SEED
from modeling_gated.errors import AbsorptionError


@dataclass(frozen=True)
class AbsorptionSettings:
    """
    What `absorb_checkpoint` does, where its defaults are not wanted.

    `distill_tokens` are distilled on, `sample_tokens` are sampled from the original for it, half of them chats, and
    `calibration_tokens` are what gates are fitted on. A batch of either has `batch_size` windows of `window_tokens` or,
    so that about half of all tokens are in such, one of `long_window_tokens`, if these are more. `refinement_epochs` is
    how often each attention block sees the calibration's windows in its own training. Of the distillation,
    `learning_rate` is the attention projections' and the norms', `gate_learning_rate` the gates', `sink_weight` what
    attention to sinks counts beside the KL divergence, and `hidden_weight` what hidden states above `hidden_limit` do.
    `save_every` and `evaluate_every` are steps; it ends early when `patience` evaluations in a row have found no lower
    loss on text for that alone. The result is measured on `measured_windows` of 512 tokens of each text, a quarter as
    many of 2,048, and a sixteenth, if that is any, of as many as the model is made for. `seed` draws windows and
    samples.

    What is left out for comparison's sake: `removes_writers`, `edits_keys` and `edits_gates` without which massive
    activations, keys and gates stay what they are at first, and `trains_gates`.
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
            AbsorptionError: for a number that is too small, or a seed that torch does not take.
        """
        least = {"distill_tokens": 0, "sample_tokens": 0, "window_tokens": 64, "batch_size": 1, "refinement_epochs": 0}
        least |= {"calibration_tokens": self.window_tokens, "save_every": 1, "evaluate_every": 1, "patience": 1}
        least |= {"measured_windows": 1, "long_window_tokens": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise AbsorptionError(f"{name} {getattr(self, name)}: at least {number} is needed")
        if not -(2**63) <= self.seed < 2**64:  # what torch takes
            raise AbsorptionError(f"seed must be at least -2**63 and less than 2**64, got {self.seed}")
        for name in ("learning_rate", "gate_learning_rate", "hidden_limit"):
            if not getattr(self, name) > 0:
                raise AbsorptionError(f"{name} {getattr(self, name)}: must be positive")
        for name in ("sink_weight", "hidden_weight"):
            if not getattr(self, name) >= 0:
                raise AbsorptionError(f"{name} {getattr(self, name)}: must not be negative")

    @property
    def steps(self) -> int:
        """Of the distillation."""
        return self.batches(self.distill_tokens)

    @property
    def length(self) -> int:
        """Tokens of a window, as a training's schedule calls them."""
        return self.window_tokens

    @property
    def batches_per_long(self) -> int:
        """One batch in so many is a long window; 0 if none is."""
        if self.long_window_tokens <= self.window_tokens:
            return 0
        return 1 + max(1, round(self.long_window_tokens / (self.window_tokens * self.batch_size)))

    def tokens(self, batches: int) -> int:
        """How many tokens so many batches have, long windows among them."""
        long = batches // self.batches_per_long if self.batches_per_long else 0
        return (batches - long) * self.window_tokens * self.batch_size + long * self.long_window_tokens

    def batches(self, tokens: int) -> int:
        """How many batches have so many tokens, and no more."""
        per_round = self.batches_per_long or 1
        rounds, left = divmod(tokens, self.tokens(per_round))
        return rounds * per_round + min(per_round - 1, left // self.tokens(1))

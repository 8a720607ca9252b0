"""What a user can mend."""


class InspectionError(ValueError):
    """A model, an input or a setting of which meters would give a wrong number; the message names it."""


class UnknownAttention(InspectionError):
    """Attention whose probabilities cannot be known from outside; all else of the model can be measured."""

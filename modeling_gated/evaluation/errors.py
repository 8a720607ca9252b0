"""What a user can mend."""


class EvaluationError(ValueError):
    """A model, a text or a setting with which an evaluation would mean nothing; the message names it."""

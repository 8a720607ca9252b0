"""Errors that a user can act on. Light, so that the command line knows them before torch is imported."""


class ModelingGatedError(ValueError):
    """Base of this package's errors. The message is one line that names the file or field and the value."""

    def __init__(self, message: object):
        line = printable(message)
        super().__init__(line if len(line) <= 2000 else line[:2000] + " ...")


class ConversionError(ModelingGatedError):
    """A checkpoint that cannot be read, converted or written."""


class TokenizerError(ConversionError):
    """A tokenizer or a chat template that cannot be used with its model."""


class EvaluationError(ModelingGatedError):
    """A model, a text or a setting with which an evaluation would mean nothing."""


class InspectionError(ModelingGatedError):
    """A model, an input or a setting for which meters would give a wrong number."""


class UnknownAttention(InspectionError):
    """Attention whose probabilities cannot be known from outside; everything else of the model can be measured."""


class AbsorptionError(ModelingGatedError):
    """A sink that cannot be absorbed, or a setting or text that cannot be used for it."""


def printable(text: object) -> str:
    """Return a text as one line that does not steer the terminal, whatever file its words come from."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)

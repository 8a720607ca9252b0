"""The error for what a user can mend."""


class ConversionError(ValueError):
    """A conversion that cannot be done. The message is one line that names the file or option and the value."""

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).split()))

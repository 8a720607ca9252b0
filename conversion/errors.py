"""The error for what a user can mend."""


class ConversionError(ValueError):
    """Work on a checkpoint that cannot be done. The message is one line that names the file or option and the value."""

    def __init__(self, message: object):
        line = " ".join(str(message).split())
        # A name taken from a hostile file must not steer the terminal.
        line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        super().__init__(line if len(line) <= 2000 else line[:2000] + " ...")

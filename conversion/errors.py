"""The error for what a user can mend."""


def printable(text: object) -> str:
    """A line of text that does not steer the terminal, whatever file its words come from."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


class ConversionError(ValueError):
    """Work on a checkpoint that cannot be done. The message is one line that names the file or option and the value."""

    def __init__(self, message: object):
        line = printable(message)
        super().__init__(line if len(line) <= 2000 else line[:2000] + " ...")

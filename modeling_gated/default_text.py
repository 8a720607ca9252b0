"""The real text that every Python brings along, on which models are compared where none is given."""

DEFAULT_TEXT_NAME = "Python's language reference"


def default_text() -> str:
    """Return Python's language reference, about 465,000 characters of English."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())

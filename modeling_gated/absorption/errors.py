"""Errors of absorbing sinks."""


class AbsorptionError(ValueError):
    """A sink that cannot be absorbed, or a setting or text that cannot be used for it."""

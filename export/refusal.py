"""The error of code that runs without torch, where `tarvis.structures` cannot be imported."""


class RefusalError(Exception):
    """What was asked for cannot be built; the message says why."""

"""The one exception for files that cannot be used."""


class CheckpointError(ValueError):
    """A file that cannot be used: the message names the file, the cause and the way out."""

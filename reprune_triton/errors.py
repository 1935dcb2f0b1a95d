"""The one error type of this package."""


class RepruneError(ValueError):
    """An error that the caller can put right: the message names the layer or file, the reason and the way out."""

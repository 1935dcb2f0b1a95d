"""The one error type of this package."""


class RepruneError(ValueError):
    """Something the caller can put right: the message names the layer or file and the way out."""

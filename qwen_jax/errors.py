"""The exceptions that callers may want to tell apart; arguments that are merely wrong raise `ValueError`."""


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, contradict each other, or hold what this package cannot read."""


class NonFiniteLogitsError(ArithmeticError):
    """The model produced NaN or infinity; raised instead of decoding it as token 0."""


class ConsumedCacheError(ValueError):
    """A KV cache was passed to `decode` a second time; its arrays were donated to the first call."""

"""The version of this package, and the oldest torch that it is for."""

__version__ = "1.0.0"

MINIMUM_TORCH = (2, 4)

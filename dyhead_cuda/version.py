"""The version of this package, and the oldest torch whose stable ABI its libraries speak."""

__version__ = "0.1.0"

MINIMUM_TORCH = (2, 11)

"""What ends a training or keeps it from beginning, each in one line that says how to go on."""

from __future__ import annotations


class RunError(Exception):
    """A run folder or checkpoint that cannot be used: what is wrong, and how to fix it."""


class RankError(Exception):
    """A process of a training with several has ended, so that the others cannot go on."""

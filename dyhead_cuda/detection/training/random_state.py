"""The states of all random number generators: Python's, numpy's, torch's and each GPU's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed(value: int) -> None:
    """Seeds all generators."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def capture() -> dict[str, Any]:
    """The states, as tensors and plain values that ``torch.load(weights_only=True)`` reads."""
    state: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (state[0], state[1].tolist(), *state[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore(states: Mapping[str, Any]) -> None:
    """Sets the states that :func:`capture` gave; a GPU's only where there is one."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def kept() -> Iterator[None]:
    """Restores the states at the end, whatever is drawn inside."""
    states = capture()
    try:
        yield
    finally:
        restore(states)

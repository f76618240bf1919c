"""Which implementation runs: the reference, or the compiled kernels of the CPU or CUDA library."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, cast

from torch import Tensor

from dyhead_cuda import library

Backend = Literal["auto", "reference", "cpu", "cuda"]
BACKENDS = ("auto", "reference", "cpu", "cuda")

_log = logging.getLogger("dyhead_cuda")
_requested: str = "auto"


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run everything inside the ``with`` block on one backend, for the whole process.

    Args:
        name: "auto" (the default: the compiled library of the input's device, or the reference
            where that is not there), "reference" (plain PyTorch on any device), "cpu" or "cuda"
            (compiled kernels, or an error that says why they cannot run).

    Raises:
        ValueError: an unknown name.
    """
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"expected backend to be one of {BACKENDS}, got {name!r}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def current() -> Backend:
    """The backend asked for: "auto" unless inside a :func:`backend` block."""
    return cast(Backend, _requested)


def select(x: Tensor) -> Literal["reference", "cpu", "cuda"]:
    """The backend that runs the operators on ``x``.

    Raises:
        ValueError: a backend was asked for that does not take tensors of this device.
        RuntimeError: its library is not loaded, with the reason and what to do.
    """
    device = x.device.type
    if _requested == "reference":
        return "reference"
    if _requested == "auto":
        if device not in ("cpu", "cuda"):
            return "reference"
        if not library.loaded(device):
            if device == "cuda":
                _warn_once(f"the CUDA library is not loaded: {library.reason('cuda')}")
            return "reference"
        return cast(Literal["cpu", "cuda"], device)
    library.require(_requested)
    if device != _requested:
        raise ValueError(
            f'backend "{_requested}" takes {_requested} tensors, got one on {x.device}; move the '
            'features and the module there, or use backend("auto")'
        )
    return cast(Literal["cpu", "cuda"], _requested)


@cache
def _warn_once(reason: str) -> None:
    _log.warning("CUDA tensors run on the slow reference here: %s", reason)

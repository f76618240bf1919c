"""What older releases of torch lack or name differently, in one place.

The package runs with every torch from :data:`dyhead_cuda.version.MINIMUM_TORCH` on. What needs a
newer one says so in an error (:func:`require`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Version = tuple[int, ...]


def minor(version: str) -> Version:
    """Major and minor number of a version, such as (2, 10) of "2.10.0+cu128"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


FOUND = minor(torch.__version__)


def require(what: str, least: Version) -> None:
    """Raises RuntimeError unless torch has at least the version that ``what`` needs."""
    if least > FOUND:
        version = ".".join(map(str, least))
        raise RuntimeError(f"{what} needs torch >= {version}, found {torch.__version__}")


def is_exporting() -> bool:
    """Whether torch.export traces; never where torch cannot tell (before 2.7)."""
    told: Any = getattr(torch.compiler, "is_exporting", None)
    return told is not None and told()


def tf32_allowed() -> bool:
    """Torch's own switch for float32 matrix products on CUDA in TF32."""
    matmul: Any = torch.backends.cuda.matmul
    if FOUND < (2, 9):
        return matmul.allow_tf32
    return matmul.fp32_precision == "tf32"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Float32 matrix products on CUDA in TF32, or not, by that switch."""
    matmul: Any = torch.backends.cuda.matmul
    name = "allow_tf32" if FOUND < (2, 9) else "fp32_precision"
    before = getattr(matmul, name)
    setattr(matmul, name, allowed if name == "allow_tf32" else "tf32" if allowed else "ieee")
    try:
        yield
    finally:
        setattr(matmul, name, before)

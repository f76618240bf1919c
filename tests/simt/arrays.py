"""16-bit floating-point values as numpy bit patterns (uint16)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

HalfName = Literal["bfloat16", "float16"]


def to_bits(values: ArrayLike, dtype: HalfName) -> NDArray[np.uint16]:
    """Values rounded to float32 and then to `dtype` (nearest, ties to even), as bit patterns."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return single.astype(np.float16).view(np.uint16)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bits(bits: NDArray[np.uint16], dtype: HalfName) -> NDArray[np.float32]:
    """The values of bit patterns, exactly."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)

"""16-bit values as numpy bit patterns (uint16), and tensors as the bindings take them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

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


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, as the bindings take it."""
    return str(dtype).removeprefix("torch.")


def to_array(t: Tensor) -> NDArray[Any]:
    """A tensor as an array: 16-bit types as bit patterns."""
    t = t.detach().contiguous()
    return t.view(torch.int16).numpy().view(np.uint16) if t.element_size() == 2 else t.numpy()


def flat_array(t: Tensor, skew: int = 0) -> NDArray[Any]:
    """The same, flat, behind `skew` elements, which move it off its alignment."""
    array = to_array(t)
    return np.concatenate([np.zeros(skew, array.dtype), array.ravel()])


def to_tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """The tensor of an array; bit patterns become `dtype`."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(dtype)
    return torch.from_numpy(array)

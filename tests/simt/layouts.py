"""The layouts of a warpgroup's product, as the documentation of CuTe (CUTLASS) writes them down.

A layout is a shape and strides of the same nesting. It maps a coordinate to the sum of coordinate
times stride; a number stands for the coordinate that is as many steps from the origin, the first
mode fastest. These are facts from another source than the emulation and the kernels, for tests to
compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Nested = int | tuple["Nested", ...]


def size(shape: Nested) -> int:
    """How many coordinates a shape has."""
    return shape if isinstance(shape, int) else int(np.prod([size(mode) for mode in shape]))


def _index(number: int, shape: Nested, stride: Nested) -> int:
    if isinstance(shape, int) or isinstance(stride, int):
        assert isinstance(shape, int)
        assert isinstance(stride, int)
        return number % shape * stride
    index = 0
    for mode, step in zip(shape, stride, strict=True):
        index += _index(number % size(mode), mode, step)
        number //= size(mode)
    return index


@dataclass(frozen=True)
class Layout:
    """``shape`` and ``stride`` of several modes, each with a number as its coordinate."""

    shape: tuple[Nested, ...]
    stride: tuple[Nested, ...]

    def __call__(self, *numbers: int) -> int:
        modes = zip(numbers, self.shape, self.stride, strict=True)
        return sum(_index(number, shape, stride) for number, shape, stride in modes)

    def table(self) -> NDArray[np.int64]:
        """All indices, by the modes' numbers."""
        sizes = tuple(size(mode) for mode in self.shape)
        return np.array([self(*numbers) for numbers in np.ndindex(sizes)]).reshape(sizes)


def sums_64xn(n: int) -> Layout:
    """CLayout_64xN: (thread, register) to row + 64 column of the sums."""
    return Layout(((4, 8, 4), (2, 2, n // 8)), ((128, 1, 16), (64, 8, 512)))


# ALayout_64x16: (thread, 16-bit value of its registers) to row + 64 column of the left operand.
LEFT_64X16 = Layout(((4, 8, 4), (2, 2, 2)), ((128, 1, 16), (64, 8, 512)))

# Layout_K_SW128_Atom of 16-bit values: (row, column) to the value's place, before the swizzle.
ATOM = Layout((8, 64), (64, 1))


def swizzle(bits: int, base: int, shift: int, index: int) -> int:
    """Swizzle<bits, base, shift>: `bits` bits from `base` on, xor those `shift` higher."""
    mask = (1 << bits) - 1 << base
    return index ^ (index >> shift & mask)


def right_addresses(rows: int) -> NDArray[np.int64]:
    """The byte at which each of [rows, 64] values is: atoms of 1,024 bytes, Swizzle<3, 4, 3>."""
    atom = 2 * ATOM.table()
    groups = 1024 * np.arange(rows // 8)[:, None, None]
    return np.vectorize(lambda byte: swizzle(3, 4, 3, byte))(groups + atom).reshape(rows, 64)

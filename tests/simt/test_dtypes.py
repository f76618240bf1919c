"""csrc/common/dtypes.h and the Python helpers against numpy's and torch's conversions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from .arrays import HalfName, from_bits, to_bits

HALVES: list[HalfName] = ["bfloat16", "float16"]
PATTERNS = np.arange(2**16, dtype=np.uint16)


def random_floats() -> NDArray[np.float32]:
    """Every exponent and sign, and the neighbourhood of every half's rounding boundary."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32)
    halves = np.concatenate([from_bits(PATTERNS, dtype) for dtype in HALVES]).view(np.uint32)
    steps = np.array([0, 1, -1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001], dtype=np.int64)
    near = (halves.astype(np.int64)[:, None] + steps).ravel().astype(np.uint32)
    return np.concatenate([bits, near]).view(np.float32)


def torch_bits(values: NDArray[np.float32], dtype: HalfName) -> NDArray[np.uint16]:
    half = torch.from_numpy(values).to(getattr(torch, dtype))
    return half.view(torch.int16).numpy().view(np.uint16)


def assert_same_bits(actual: NDArray[Any], expected: NDArray[Any], nan: NDArray[np.bool_]) -> None:
    np.testing.assert_array_equal(actual[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_widening_is_exact(simt: Any, dtype: HalfName) -> None:
    actual = getattr(simt.emulator, f"{dtype}_to_float")(PATTERNS)
    expected = torch.from_numpy(PATTERNS.view(np.int16)).view(getattr(torch, dtype)).float().numpy()
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    assert_same_bits(actual.view(np.uint32), expected.view(np.uint32), nan)
    assert_same_bits(from_bits(PATTERNS, dtype).view(np.uint32), expected.view(np.uint32), nan)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_to_nearest_even(simt: Any, dtype: HalfName) -> None:
    values = random_floats()
    nan = np.isnan(values)
    expected = torch_bits(values, dtype)
    actual = getattr(simt.emulator, f"float_to_{dtype}")(values)
    assert_same_bits(actual, expected, nan)
    assert_same_bits(to_bits(values, dtype), expected, nan)
    for bits in (actual, to_bits(values, dtype)):
        assert np.isnan(from_bits(bits, dtype)[nan]).all()
        assert not np.isnan(from_bits(bits, dtype)[~nan]).any()


def test_float16_agrees_with_numpy(simt: Any) -> None:
    values = random_floats()
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore", under="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(simt.emulator.float_to_float16(values), expected)

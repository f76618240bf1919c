"""The sort of items in shared memory, which the gradient of the features builds upon."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("seed")

SMALLEST = 7


def check_sort(simt: Any, keys: np.ndarray[Any, Any], largest: int) -> None:
    """Against numpy's stable sort."""
    keys = keys.astype(np.uint32)
    order = simt.emulator.sort(keys, SMALLEST, largest)
    expected = np.argsort(np.minimum(keys - np.uint32(SMALLEST), largest), kind="stable")
    np.testing.assert_array_equal(order, expected)


@pytest.mark.parametrize("count", [1, 31, 64, 257, 576, 1152])
def test_counts(simt: Any, count: int) -> None:
    check_sort(simt, SMALLEST + np.random.default_rng(0).integers(0, 300, count), 300)


@pytest.mark.parametrize("largest", [1, 63, 64, 4095, 4096, 2**31, 2**32 - 1 - SMALLEST])
def test_ranges(simt: Any, largest: int) -> None:
    """From one to six digits."""
    check_sort(simt, SMALLEST + np.random.default_rng(1).integers(0, largest, 300), largest)


def test_beyond_the_largest_key(simt: Any) -> None:
    """These come last, in their order."""
    keys = SMALLEST + np.random.default_rng(2).integers(0, 100, 600)
    keys[::3] = SMALLEST + 3 * 4096 + 5
    check_sort(simt, keys, 100)


def test_equal_keys(simt: Any) -> None:
    check_sort(simt, np.full(600, SMALLEST + 5), 70)

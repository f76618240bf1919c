"""The sort of items in shared memory, which the gradient of the features builds upon."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("seed")

SMALLEST = 7


def check_sort(simt: Any, keys: np.ndarray[Any, Any], key_range: int) -> None:
    """Against numpy's stable sort."""
    order = simt.emulator.sort(keys.astype(np.uint32), SMALLEST, key_range)
    np.testing.assert_array_equal(order, np.argsort(keys, kind="stable"))


@pytest.mark.parametrize("count", [1, 31, 64, 257, 576, 1152])
def test_counts(simt: Any, count: int) -> None:
    check_sort(simt, SMALLEST + np.random.default_rng(0).integers(0, 300, count), 300)


@pytest.mark.parametrize("key_range", [1, 63, 64, 4095, 4096, 2**31, 2**32 - 1 - SMALLEST])
def test_ranges(simt: Any, key_range: int) -> None:
    """From one to six digits."""
    check_sort(simt, SMALLEST + np.random.default_rng(1).integers(0, key_range, 300), key_range)


def test_equal_keys(simt: Any) -> None:
    check_sort(simt, np.full(600, SMALLEST + 5), 70)

"""The CUDA pack_levels and unpack_levels, compiled for the host: every element at its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Size = tuple[int, int]
INTEGERS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
element_sizes = pytest.mark.parametrize("element_bytes", INTEGERS)


def flat(array: NDArray[Any], skew: int) -> NDArray[Any]:
    return np.concatenate([np.zeros(skew, array.dtype), array.ravel()])


def check(
    simt: Any,
    element_bytes: int,
    images: int,
    channels: int,
    sizes: list[Size],
    channels_last: list[bool],
    *,
    skew: int = 0,
    max_blocks: int = 1 << 20,
) -> None:
    """Packs random bits and unpacks them again."""
    source = np.random.default_rng(element_bytes)
    levels, data, rows, first_row = [], [], [], 0
    for (height, width), last in zip(sizes, channels_last, strict=True):
        values = source.integers(
            1, 256 ** min(element_bytes, 7), (images, height * width, channels)
        ).astype(INTEGERS[element_bytes])
        rows.append(values.reshape(-1, channels))
        data.append(flat(values if last else values.transpose(0, 2, 1), skew))
        levels.append(simt.pack_levels.Level(first_row, height, width))
        first_row += images * height * width
    expected = flat(np.concatenate(rows), skew)
    options = {"skew": skew, "max_blocks": max_blocks}
    arguments = (element_bytes, images, channels, levels)
    actual = simt.pack_levels.pack(*arguments, data, channels_last, **options)
    assert np.array_equal(actual[skew:], expected[skew:])
    unpacked = simt.pack_levels.unpack(*arguments, expected, **options)
    for level, values in zip(unpacked, rows, strict=True):
        pixels = len(values) // max(images, 1)
        wanted = values.reshape(images, pixels, channels).transpose(0, 2, 1)
        assert np.array_equal(level[skew:], wanted.ravel())


@element_sizes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("channels", [1, 27, 32, 33, 64, 100])
def test_sizes(simt: Any, channels: int, skew: int, element_bytes: int) -> None:
    sizes = [(9, 16), (5, 8), (3, 4), (2, 2), (1, 1)]
    for last in ([False] * 5, [False, True, False, True, False]):
        check(simt, element_bytes, 2, channels, sizes, last, skew=skew)


@element_sizes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("max_blocks", [1, 3])
def test_blocks_take_several_tiles(simt: Any, max_blocks: int, element_bytes: int) -> None:
    sizes = [(16, 16), (33, 9)]
    for last in ([False, False], [True, False]):
        check(simt, element_bytes, 1, 70, sizes, last, max_blocks=max_blocks)


@element_sizes
def test_large_copies(simt: Any, element_bytes: int) -> None:
    for channels in (64, 61):
        check(simt, element_bytes, 2, channels, [(30, 41), (3, 3)], [True, True])


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("empty", [(0, 4), (4, 0)])
def test_levels_without_pixels(simt: Any, empty: Size, images: int) -> None:
    for last in (False, True):
        check(simt, 4, images, 5, [empty, (2, 3), empty, (1, 4), empty], [last] * 5)


def test_more_levels_than_a_launch_takes(simt: Any) -> None:
    count = 2 * simt.pack_levels.levels_per_launch + 1
    sizes = [(i % 3 + 1, 2) for i in range(count)]
    check(simt, 2, 2, 3, sizes, [i % 4 == 0 for i in range(count)])


@settings(max_examples=25)
@given(
    element_bytes=st.sampled_from(list(INTEGERS)),
    images=st.integers(0, 3),
    channels=st.integers(1, 80),
    levels=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=5
    ),
    skew=st.integers(0, 2),
    max_blocks=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_random_sizes(
    simt: Any,
    element_bytes: int,
    images: int,
    channels: int,
    levels: list[tuple[int, int, bool]],
    skew: int,
    max_blocks: int,
    seed: int,
) -> None:
    simt.set_seed(seed)
    sizes, last = [(h, w) for h, w, _ in levels], [last for *_, last in levels]
    check(simt, element_bytes, images, channels, sizes, last, skew=skew, max_blocks=max_blocks)

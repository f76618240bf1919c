"""``dyhead::pack_levels`` and ``unpack_levels`` against permutations in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dyhead_cuda import fused, library
from dyhead_cuda.ops.pack_levels import pack_levels, unpack_levels
from tests.helpers.compare import TOLERANCE, leaf
from tests.helpers.devices import each_device
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.packing import check, expected_rows

library.require("cpu")

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "sliced":
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    return x.contiguous()


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("channels", [1, 27, 64])
def test_levels(channels: int, images: int, layout: str, dtype: torch.dtype) -> None:
    levels = random_pyramid(images, channels, halving_sizes(13, 21, 4), dtype)
    check([laid_out(x, layout) for x in levels])
    check([laid_out(levels[0], layout)])


@dtypes
@each_device
@pytest.mark.parametrize("channels", [1, 27, 64])
@pytest.mark.parametrize("mixed", [False, True])
def test_levels_of_two_layouts(mixed: bool, channels: int, device: str, dtype: torch.dtype) -> None:
    levels = [x.to(device) for x in random_pyramid(2, channels, halving_sizes(13, 21, 4), dtype)]
    if mixed:
        levels[::2] = [laid_out(x, "channels_last") for x in levels[::2]]
    check(levels)


@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 70),
    levels=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from(LAYOUTS)),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_mix_of_layouts(
    images: int, channels: int, levels: list[tuple[int, int, str]], dtype: torch.dtype
) -> None:
    pyramid = random_pyramid(images, channels, [(h, w) for h, w, _ in levels], dtype)
    check([laid_out(x, layout) for x, (*_, layout) in zip(pyramid, levels, strict=True)])


@dtypes
def test_bits_are_kept(dtype: torch.dtype) -> None:
    # NaN with any payload, denormals and negative zeros.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.randint(-(2**15), 2**15, (2, 33, 17, 19)).to(integers) << (8 * dtype.itemsize - 16)
    rows = pack_levels([bits.view(dtype), bits.view(dtype)])
    assert torch.equal(rows.view(integers), expected_rows([bits, bits]))
    _, again = torch.ops.dyhead.unpack_levels(rows, 2, [17, 19, 17, 19])
    assert again.is_contiguous()
    assert torch.equal(again.view(integers), bits)


def test_one_channels_last_level_is_not_copied() -> None:
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    assert fused.pack([x]).data_ptr() == x.data_ptr()


@each_device
def test_gradcheck(device: str) -> None:
    a, b, c = (leaf(x.to(device)) for x in random_pyramid(2, 3, [(3, 4), (2, 2), (1, 1)]))
    b = laid_out(b.detach(), "channels_last").requires_grad_()
    assert torch.autograd.gradcheck(lambda *levels: pack_levels(levels), (a, b, c))


@dtypes
@each_device
@pytest.mark.parametrize("images", [0, 2])
def test_opcheck(images: int, device: str, dtype: torch.dtype) -> None:
    levels = [leaf(x.to(device)) for x in random_pyramid(images, 5, [(3, 4), (2, 2)], dtype)]
    torch.library.opcheck(torch.ops.dyhead.pack_levels, (levels,))
    rows = pack_levels([x.detach() for x in levels])
    torch.library.opcheck(torch.ops.dyhead.unpack_levels, (rows, images, [3, 4, 2, 2]))


def test_threads_give_the_same_bits(threads: None) -> None:
    levels = random_pyramid(2, 37, halving_sizes(50, 84, 4))
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        assert torch.equal(pack_levels(levels), expected_rows(levels))


def test_both_are_linear_so_that_second_derivatives_are_right() -> None:
    sizes = [(3, 4), (2, 2)]
    levels = [leaf(x) for x in random_pyramid(2, 3, sizes)]
    assert torch.autograd.gradgradcheck(lambda *x: pack_levels(x) ** 2, levels)
    rows = leaf(pack_levels(levels).detach())

    def squares(rows: Tensor) -> list[Tensor]:
        return [x**2 for x in unpack_levels(rows, sizes, 2)]

    assert torch.autograd.gradcheck(squares, rows)
    assert torch.autograd.gradgradcheck(squares, rows)


def test_bad_levels_raise() -> None:
    x = torch.randn(2, 3, 4, 5)
    pack, unpack = torch.ops.dyhead.pack_levels, torch.ops.dyhead.unpack_levels
    for bad, message in (
        ([x, x[:1]], r"expected levels \[2, 3, H, W\], got \[1, 3, 4, 5\]"),
        ([x, torch.randn(2, 4, 4, 5)], r"expected levels \[2, 3, H, W\]"),
        ([x, x[0]], r"expected levels \[2, 3, H, W\]"),
        ([x[0]], r"expected levels \[N, C, H, W\]"),
        ([x, x.double()], "of one type"),
        ([x.mT], r"call .contiguous\(\)"),
        ([x.int()], "expected float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pack(bad)
    rows = torch.randn(40, 3)
    for arguments, message in (
        ((rows.mT, 2, [4, 5]), "expected contiguous rows"),
        ((rows, 2, [4]), "2 n integers"),
        ((rows, -1, [4, 5]), "expected images from 0"),
        ((rows, 2, [5, 5]), "within 40 rows"),
        ((rows, 2, [4, 5, 1, 1]), "within 40 rows"),
        ((rows, 2, [4, 4]), "cover all 40 rows"),
        ((rows, 2, [-4, -5]), "the height of a map"),
    ):
        with pytest.raises(RuntimeError, match=message):
            unpack(*arguments)

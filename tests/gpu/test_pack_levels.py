"""The CUDA pack_levels and unpack_levels on a GPU: every element at its place."""

from __future__ import annotations

import pytest
import torch

from dyhead_cuda import library
from dyhead_cuda.ops.pack_levels import pack_levels
from tests.helpers.compare import TOLERANCE
from tests.helpers.inputs import halving_sizes
from tests.helpers.packing import check

from .device import heavy, need_memory

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _library() -> None:
    library.require("cuda")


@dtypes
@pytest.mark.parametrize(
    ("images", "channels", "size"),
    [(2, 256, (100, 168)), (40_000, 3, (2, 2)), (1, 2050, (7, 9)), (1, 1, (1500, 1100))],
    ids=str,
)
def test_sizes(images: int, channels: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    levels = [
        torch.randn(images, channels, *s, device=DEVICE).to(dtype) for s in halving_sizes(*size, 5)
    ]
    check(levels)
    check([x.contiguous(memory_format=torch.channels_last) for x in levels])


def test_unaligned_and_empty_levels() -> None:
    memory = torch.randn(2 * 16 * 9 + 1, device=DEVICE)
    x = memory[1:].view(2, 16, 3, 3)
    last = memory[1:].view(2, 3, 3, 16).permute(0, 3, 1, 2)
    check([x, x.new_empty(2, 16, 0, 3), last])
    check([x[:0], last[:0]])


@heavy
def test_more_than_2_to_the_31_elements() -> None:
    need_memory(40)
    x = torch.empty(1, 256, 3000, 3000, dtype=torch.bfloat16, device=DEVICE).normal_()
    assert x.numel() > 2**31
    rows = pack_levels([x])
    assert torch.equal(rows[-9000:], x[:, :, -3:].permute(0, 2, 3, 1).reshape(-1, 256))
    assert torch.equal(rows[:, -1], x[0, -1].reshape(-1))
    (again,) = torch.ops.dyhead.unpack_levels(rows, 1, [3000, 3000])
    assert torch.equal(again, x)

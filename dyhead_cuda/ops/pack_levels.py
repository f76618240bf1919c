"""``dyhead::pack_levels`` and its transpose ``unpack_levels``: a pyramid as one matrix of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.ops.common import forbid_second_derivative
from dyhead_cuda.ops.jobs import MAP_FIELDS, stack_maps

_HEIGHT, _WIDTH = MAP_FIELDS.index("height"), MAP_FIELDS.index("width")


def pack_levels(levels: Sequence[Tensor]) -> Tensor:
    """Levels [N, C, H_l, W_l] as rows [sum N H_l W_l, C]: level-major, then image, then y and x.

    Args:
        levels: of one type and with one number of images and channels, each of any strides;
            contiguous and channels_last ones are read as they are.

    Returns:
        A new matrix of the levels' type.
    """
    return torch.ops.dyhead.pack_levels([x if _is_dense(x) else x.contiguous() for x in levels])


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _fake_pack(levels: Sequence[Tensor]) -> Tensor:
    first = levels[0]
    rows = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in levels)
    return first.new_empty(rows, first.shape[1])


def _fake_unpack(rows: Tensor, images: int, maps: Sequence[int]) -> list[Tensor]:
    return [
        rows.new_empty(images, rows.shape[1], maps[i + _HEIGHT], maps[i + _WIDTH])
        for i in range(0, len(maps), len(MAP_FIELDS))
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (levels,) = inputs
    ctx.images = levels[0].shape[0]
    ctx.sizes = [(x.shape[2], x.shape[3]) for x in levels]
    ctx.channels_last = [not x.is_contiguous() for x in levels]


def _backward(ctx: Any, grad_rows: Tensor) -> list[Tensor]:
    rows, images, channels = grad_rows.contiguous(), ctx.images, grad_rows.shape[1]
    maps = stack_maps(ctx.sizes, images)
    copied = [m.numbers() for m, last in zip(maps, ctx.channels_last, strict=True) if not last]
    copies = iter(torch.ops.dyhead.unpack_levels(rows, images, list(chain.from_iterable(copied))))
    return [
        # The rows of a channels_last level are its gradient already.
        rows[m.first_row :][: images * m.pixels]
        .view(images, m.height, m.width, channels)
        .permute(0, 3, 1, 2)
        if last
        else next(copies)
        for m, last in zip(maps, ctx.channels_last, strict=True)
    ]


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::pack_levels", _fake_pack)
    torch.library.register_fake("dyhead::unpack_levels", _fake_unpack)
    torch.library.register_autograd("dyhead::pack_levels", _backward, setup_context=_setup_context)
    forbid_second_derivative("unpack_levels")

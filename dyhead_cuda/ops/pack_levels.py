"""``dyhead::pack_levels`` and its transpose ``unpack_levels``: a pyramid as one matrix of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.numerics import is_channels_last
from dyhead_cuda.ops.jobs import MAP_FIELDS, Map, stack_maps
from dyhead_cuda.ops.transforms import call, register_autograd

_HEIGHT, _WIDTH = MAP_FIELDS.index("height"), MAP_FIELDS.index("width")


def pack_levels(levels: Sequence[Tensor]) -> Tensor:
    """Levels [N, C, H_l, W_l] as rows [sum N H_l W_l, C]: level-major, then image, then y and x.

    Args:
        levels: of one type and with one number of images and channels, each of any strides;
            contiguous and channels_last ones are read as they are.

    Returns:
        A new matrix of the levels' type.
    """
    return call("pack_levels", [x if _is_dense(x) else x.contiguous() for x in levels])


def unpack_levels(rows: Tensor, maps: Sequence[Map], images: int) -> list[Tensor]:
    """The transpose of :func:`pack_levels`: rows [R, C] as contiguous levels [N, C, H_l, W_l].

    Args:
        rows: of one type.
        maps: those to copy out.
        images: N.

    Returns:
        A new tensor for each map.
    """
    numbers = list(chain.from_iterable(m.numbers() for m in maps))
    return call("unpack_levels", rows.contiguous(), images, numbers)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or is_channels_last(x)


def _fake_pack(levels: Sequence[Tensor]) -> Tensor:
    first = levels[0]
    rows = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in levels)
    return first.new_empty(rows, first.shape[1])


def _fake_unpack(rows: Tensor, images: int, maps: Sequence[int]) -> list[Tensor]:
    return [
        rows.new_empty(images, rows.shape[1], maps[i + _HEIGHT], maps[i + _WIDTH])
        for i in range(0, len(maps), len(MAP_FIELDS))
    ]


def _levels_of_gradient(
    grad_rows: Tensor, maps: Sequence[Map], images: int, channels_last: Sequence[bool]
) -> list[Tensor]:
    """The gradients of levels, each in its level's memory format."""
    rows, channels = grad_rows.contiguous(), grad_rows.shape[1]
    copied = [m for m, last in zip(maps, channels_last, strict=True) if not last]
    copies = iter(unpack_levels(rows, copied, images))
    return [
        # The rows of a channels_last level are its gradient already.
        rows[m.first_row :][: images * m.pixels]
        .view(images, m.height, m.width, channels)
        .permute(0, 3, 1, 2)
        if last
        else next(copies)
        for m, last in zip(maps, channels_last, strict=True)
    ]


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (levels,) = inputs
    ctx.images = levels[0].shape[0]
    ctx.maps = stack_maps([(x.shape[2], x.shape[3]) for x in levels], ctx.images)
    ctx.channels_last = [not x.is_contiguous() for x in levels]


def _pack_backward(ctx: Any, grad_rows: Tensor) -> list[Tensor]:
    return _levels_of_gradient(grad_rows, ctx.maps, ctx.images, ctx.channels_last)


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    rows, ctx.images, maps = inputs
    ctx.shape = rows.shape
    ctx.maps = [Map(*maps[i : i + len(MAP_FIELDS)]) for i in range(0, len(maps), len(MAP_FIELDS))]


def _unpack_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor, None, None]:
    packed = pack_levels(grads)
    in_a_row = ctx.maps == stack_maps([(m.height, m.width) for m in ctx.maps], ctx.images)
    if in_a_row and packed.shape == ctx.shape:
        return packed, None, None
    whole = packed.new_zeros(ctx.shape)
    counts = [ctx.images * m.pixels for m in ctx.maps]
    for m, count, part in zip(ctx.maps, counts, packed.split(counts), strict=True):
        whole = whole + F.pad(part, (0, 0, m.first_row, ctx.shape[0] - m.first_row - count))
    return whole, None, None


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::pack_levels", _fake_pack)
    torch.library.register_fake("dyhead::unpack_levels", _fake_unpack)
    register_autograd("pack_levels", _pack_backward, setup_context=_setup_pack)
    register_autograd("unpack_levels", _unpack_backward, setup_context=_setup_unpack)

"""``dyhead::pack_levels`` and its transpose ``unpack_levels``: a pyramid as one matrix of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.numerics import is_channels_last
from dyhead_cuda.ops.common import dense
from dyhead_cuda.ops.folding import Images, Rows, register_folding
from dyhead_cuda.ops.jobs import Size, map_rows, size_numbers
from dyhead_cuda.ops.transforms import call, register_autograd


def pack_levels(levels: Sequence[Tensor]) -> Tensor:
    """Levels [N, C, H_l, W_l] as rows [sum N H_l W_l, C]: level-major, then image, then y and x.

    Args:
        levels: of one type and with one number of images and channels, each of any strides;
            contiguous and channels_last ones are read as they are.

    Returns:
        A new matrix of the levels' type.
    """
    return call("pack_levels", [_laid_out(x) for x in levels])


def unpack_levels(rows: Tensor, sizes: Sequence[Size], images: int) -> list[Tensor]:
    """The transpose of :func:`pack_levels`: rows [R, C] as contiguous levels [N, C, H_l, W_l].

    Args:
        rows: of one type.
        sizes: (H_l, W_l) of every level; together they have all rows.
        images: N.

    Returns:
        A new tensor for each level.
    """
    return list(call("unpack_levels", dense(rows), images, size_numbers(sizes)))


def _laid_out(x: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) and is_channels_last(x) else dense(x)


def _fake_pack(levels: Sequence[Tensor]) -> Tensor:
    first = levels[0]
    rows = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in levels)
    return first.new_empty(rows, first.shape[1])


def _fake_unpack(rows: Tensor, images: int, sizes: Sequence[int]) -> list[Tensor]:
    return [
        rows.new_empty(images, rows.shape[1], height, width)
        for height, width in zip(sizes[::2], sizes[1::2], strict=True)
    ]


def _levels_of_gradient(
    grad_rows: Tensor, sizes: Sequence[Size], images: int, channels_last: Sequence[bool]
) -> list[Tensor]:
    """The gradients of levels, each in its level's memory format."""
    rows, channels = dense(grad_rows), grad_rows.shape[1]
    if not any(channels_last):
        return unpack_levels(rows, sizes, images)
    levels = []
    for size, part, last in zip(
        sizes, rows.split(map_rows(sizes, images)), channels_last, strict=True
    ):
        if last:  # its rows are its gradient already
            levels.append(part.view(images, *size, channels).permute(0, 3, 1, 2))
        else:
            levels += unpack_levels(part, [size], images)
    return levels


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (levels,) = inputs
    ctx.images = levels[0].shape[0]
    ctx.sizes = [(x.shape[2], x.shape[3]) for x in levels]
    ctx.channels_last = [not x.is_contiguous() for x in levels]


def _pack_backward(ctx: Any, grad_rows: Tensor) -> list[Tensor]:
    return _levels_of_gradient(grad_rows, ctx.sizes, ctx.images, ctx.channels_last)


def _unpack_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor, None, None]:
    return pack_levels(grads), None, None


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::pack_levels", _fake_pack)
    torch.library.register_fake("dyhead::unpack_levels", _fake_unpack)
    register_autograd("pack_levels", _pack_backward, setup_context=_setup_pack)
    register_autograd("unpack_levels", _unpack_backward)
    register_folding("pack_levels", {"levels": Images(0)}, Rows("levels"))
    register_folding("unpack_levels", {"rows": Rows("sizes")}, Images(0))

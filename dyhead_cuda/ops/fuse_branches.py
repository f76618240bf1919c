"""``dyhead::fuse_branches_fwd`` and ``_bwd``: a block's last step, in one pass over pixels.

Normalisation, gates, upsampling and average are affine per channel once a few sums are known: what
is left to do with pixels is a scaled sum of the upsampled branches and the dynamic ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.ops.common import compute_dtype, forbid_second_derivative
from dyhead_cuda.ops.jobs import LEVEL_FIELDS, Map, UpsampleMode, level_numbers
from dyhead_cuda.ops.transforms import call, register_autograd

_HEIGHT, _WIDTH = LEVEL_FIELDS.index("height"), LEVEL_FIELDS.index("width")


def fuse_branches(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    images: int,
    maps: Sequence[Map],
    levels: Sequence[tuple[Map, Sequence[int]]],
    up_mode: UpsampleMode = UpsampleMode.BILINEAR,
) -> Tensor:
    """max(a1 . z + b1, a2 . z + b2) with z = sum_b scale[b] . upsampled(y_b) + shift.

    Args:
        y: [S, C], the rows of all branch maps.
        scale: [J, N, C], a factor of every branch.
        shift: [L, N, C].
        coefficients: [L, N, 4, C] in the order a1, b1, a2, b2. Like scale and shift it may be of
            any floating type: they are converted to the accumulation type.
        images: N.
        maps: the J branch maps, which lie one after the other and cover y.
        levels: the L output maps, which lie one after the other, each with the indices of its one
            to three branches. Every branch belongs to one level.
        up_mode: how a branch is upsampled to its level's size, if it has another.

    Returns:
        Rows [R, C] of all levels, of y's type.
    """
    dtype = compute_dtype(y.dtype)
    return call(
        "fuse_branches_fwd",
        y.contiguous(),
        scale.to(dtype).contiguous(),
        shift.to(dtype).contiguous(),
        coefficients.to(dtype).contiguous(),
        images,
        *fuse_tables(maps, levels, up_mode),
    )


def fuse_tables(
    maps: Sequence[Map],
    levels: Sequence[tuple[Map, Sequence[int]]],
    up_mode: UpsampleMode = UpsampleMode.BILINEAR,
) -> tuple[list[int], list[int]]:
    """The operator's integer tables."""
    records = [level_numbers(out, branches, up_mode) for out, branches in levels]
    return list(chain.from_iterable(m.numbers() for m in maps)), list(chain(*records))


def _fake_fwd(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    images: int,
    maps: list[int],
    levels: list[int],
) -> Tensor:
    step = len(LEVEL_FIELDS)
    pixels = sum(levels[i + _HEIGHT] * levels[i + _WIDTH] for i in range(0, len(levels), step))
    return y.new_empty(images * pixels, y.shape[1])


def _fake_bwd(
    grad_out: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    images: int,
    maps: list[int],
    levels: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(y),
        torch.empty_like(scale),
        torch.empty_like(shift),
        torch.empty_like(coefficients),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.images, ctx.maps, ctx.levels = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = call(
        "fuse_branches_bwd",
        grad_out.to(tensors[0].dtype).contiguous(),
        *tensors,
        ctx.images,
        ctx.maps,
        ctx.levels,
    )
    return (*grads, None, None, None)


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::fuse_branches_fwd", _fake_fwd)
    torch.library.register_fake("dyhead::fuse_branches_bwd", _fake_bwd)
    register_autograd("fuse_branches_fwd", _backward, setup_context=_setup_context)
    forbid_second_derivative("fuse_branches_bwd")

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
from dyhead_cuda.ops.common import (
    compute_dtype,
    dense,
    forbid_second_derivative,
    wanted_gradients,
)
from dyhead_cuda.ops.folding import Images, Rows, register_folding
from dyhead_cuda.ops.jobs import Size, UpsampleMode, level_numbers, pixels_of, size_numbers
from dyhead_cuda.ops.transforms import call, register_autograd


def fuse_branches(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    images: int,
    branches: Sequence[Size],
    levels: Sequence[tuple[Size, Sequence[int]]],
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
        branches: the sizes of the J branch maps, which lie one after the other and cover y.
        levels: the sizes of the L output maps, which lie one after the other, each with the indices
            of its one to three branches. Every branch belongs to one level.
        up_mode: how a branch is upsampled to its level's size, if it has another.

    Returns:
        Rows [R, C] of all levels, of y's type.
    """
    y = dense(y)
    dtype = compute_dtype(y.dtype)
    return call(
        "fuse_branches_fwd",
        y,
        dense(scale, dtype),
        dense(shift, dtype),
        dense(coefficients, dtype),
        *fuse_tables(images, branches, levels, up_mode),
    )


def fuse_tables(
    images: int,
    branches: Sequence[Size],
    levels: Sequence[tuple[Size, Sequence[int]]],
    up_mode: UpsampleMode = UpsampleMode.BILINEAR,
) -> tuple[int, list[int], list[int], list[int], int]:
    """The operator's integer arguments: see :func:`fuse_branches`."""
    return (
        images,
        size_numbers(branches),
        size_numbers([size for size, _ in levels]),
        list(chain.from_iterable(level_numbers(indices) for _, indices in levels)),
        int(up_mode),
    )


def _fake_fwd(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    images: int,
    branch_sizes: list[int],
    level_sizes: list[int],
    level_branches: list[int],
    up_mode: int,
) -> Tensor:
    return y.new_empty(images * pixels_of(level_sizes), y.shape[1])


def _fake_bwd(
    grad_out: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    images: int,
    branch_sizes: list[int],
    level_sizes: list[int],
    level_branches: list[int],
    up_mode: int,
    wanted: list[int],
) -> tuple[Tensor, ...]:
    tensors = (y, scale, shift, coefficients)
    return tuple(
        torch.empty_like(t) if want else t.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.tables = inputs[4:]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    wanted = wanted_gradients(ctx.needs_input_grad[:4])
    grads = call(
        "fuse_branches_bwd",
        dense(grad_out, tensors[0].dtype),
        *tensors,
        *ctx.tables,
        wanted,
    )
    needed = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return (*needed, *[None] * len(ctx.tables))


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::fuse_branches_fwd", _fake_fwd)
    torch.library.register_fake("dyhead::fuse_branches_bwd", _fake_bwd)
    register_autograd("fuse_branches_fwd", _backward, setup_context=_setup_context)
    forbid_second_derivative("fuse_branches_bwd")
    _out = Rows("level_sizes")
    _tensors: dict[str, Images | Rows] = {
        "y": Rows("branch_sizes"),
        **dict.fromkeys(("scale", "shift", "coefficients"), Images(1)),
    }
    register_folding("fuse_branches_fwd", _tensors, _out)
    register_folding("fuse_branches_bwd", {"grad_out": _out, **_tensors}, *_tensors.values())

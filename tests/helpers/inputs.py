"""Random feature maps and parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dyhead_cuda.pyramid import BlockParameters, BranchParameters
from tests.helpers.compare import leaf


def halving_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Sizes of a valid pyramid, finest first."""
    sizes = [(height, width)]
    while len(sizes) < levels:
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes


def random_pyramid(
    batch: int,
    channels: int,
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """Normal feature maps [N, C, H, W], one for each of ``sizes``."""
    source = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, *size, generator=source, dtype=torch.float64).to(dtype)
        for size in sizes
    ]


def random_block_parameters(
    in_channels: int,
    out_channels: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    offset_scale: float = 1.0,
    seed: int = 1,
) -> BlockParameters:
    """Parameters of a block of which none is zero or constant, with offsets of a few pixels.

    The norm and gate biases keep the gates and the dynamic ReLU on both sides of their corners.
    """
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=source, dtype=torch.float64)
        return (around + scale * values).to(dtype)

    def branch() -> BranchParameters:
        return BranchParameters(
            normal(out_channels, in_channels, 3, 3, scale=(9 * in_channels) ** -0.5),
            normal(out_channels) if bias else None,
            normal(out_channels, scale=0.3, around=1),
            normal(out_channels, scale=0.5),
        )

    hidden = max(1, out_channels // 4)
    return BlockParameters(
        normal(27, in_channels, 3, 3, scale=offset_scale * (9 * in_channels) ** -0.5),
        normal(27, scale=0.5),
        branch(),
        branch(),
        branch(),
        normal(out_channels, scale=out_channels**-0.5),
        normal(1, around=0.5),
        normal(hidden, out_channels, scale=out_channels**-0.5),
        normal(hidden, around=0.5),
        normal(4 * out_channels, hidden, scale=hidden**-0.5),
        normal(4 * out_channels),
    )


def flat_parameters(parameters: BlockParameters) -> list[Tensor]:
    """All tensors of ``parameters``, in order."""
    tensors: list[Tensor] = []
    for value in parameters:
        tensors += [t for t in value if t is not None] if isinstance(value, tuple) else [value]
    return tensors


def rebuild_parameters(like: BlockParameters, tensors: Sequence[Tensor]) -> BlockParameters:
    """``tensors`` in the places where :func:`flat_parameters` found those of ``like``."""
    rest = iter(tensors)

    def take(value: Tensor | BranchParameters | None) -> Tensor | BranchParameters | None:
        if isinstance(value, BranchParameters):
            return BranchParameters(*map(take, value))  # type: ignore[arg-type]
        return None if value is None else next(rest)

    return BlockParameters(*map(take, like))  # type: ignore[arg-type]


def random_relu_inputs(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float64,
    *,
    hidden: int | None = None,
    parameter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """x of ``shape`` and the four parameters of a dynamic ReLU, with some gates saturated."""
    source = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=source, dtype=torch.float64)

    channels = shape[1]
    hidden = hidden or max(1, channels // 4)
    mean = normal(shape[0], channels).view(shape[0], channels, *[1] * (len(shape) - 2))
    values = [
        normal(*shape) + 0.5 * mean,
        normal(hidden, channels) / math.sqrt(channels),
        normal(hidden) + 0.5,
        normal(4 * channels, hidden) / math.sqrt(hidden),
        2 * normal(4 * channels),
    ]
    kinds = [dtype] + [parameter_dtype or dtype] * 4
    return [leaf(value, kind) for value, kind in zip(values, kinds, strict=True)]

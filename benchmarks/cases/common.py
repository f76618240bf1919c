"""What the cases share: sizes, layouts, and how much work there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cases.problems import Implementation, Layout, Maps, Run
from dyhead_cuda import fused
from dyhead_cuda.modules import DynamicReLU
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.pyramid import TAPS

Size = tuple[int, int]


def conv_flops(pixels: int, in_channels: int, out_channels: int) -> int:
    """FLOPs of a 3x3 convolution, deformable or not; ``pixels`` are those of the output."""
    return 2 * TAPS * in_channels * out_channels * pixels


def relu_flops(images: int, channels: int, reduction: int = 4) -> int:
    """FLOPs of the two fully connected layers of the dynamic ReLU."""
    hidden = max(1, channels // reduction)
    return 2 * images * (channels * hidden + hidden * 4 * channels)


def pixels_of(sizes: Sequence[Size]) -> int:
    """The pixels of maps of these sizes together."""
    return sum(height * width for height, width in sizes)


def branch_sizes(levels: Sequence[Size]) -> list[Size]:
    """Sizes of a block's branch maps: per level mid, low and high, as far as it has them."""
    sizes = []
    for level, size in enumerate(levels):
        sizes += [size] + [size] * (level > 0) + list(levels[level + 1 : level + 2])
    return sizes


def branch_counts(levels: Sequence[Size]) -> list[int]:
    """The number of branches of each level."""
    return [1 + (i > 0) + (i + 1 < len(levels)) for i in range(len(levels))]


def rows_of(sizes: Sequence[Size], images: int) -> Layout:
    """Maps of such sizes as one matrix of rows."""
    return Layout(
        lambda maps: [fused.pack(maps)], lambda rows: fused.unpack_rows(rows[0], sizes, images)
    )


def between_pixels(maps: Maps) -> Maps:
    """Offsets without whole numbers, where gradients jump and every implementation has its own."""
    return [torch.where(x == x.round(), x + 0.5, x) for x in maps]


def in_compute_dtype(t: Tensor) -> Tensor:
    """``t`` in the type that our kernels compute in."""
    return t.to(compute_dtype(t.dtype))


def layers_and_compiled(layers: Run, layers_compiled: Run) -> list[Implementation]:
    """The layers one by one, as they are and under torch.compile."""
    name = "layer by layer"
    return [
        Implementation(name, "layers", layers),
        Implementation(f"{name}, torch.compile", "compile", layers_compiled, compiled=True),
    ]


def relu_parameters(relu: DynamicReLU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and biases of both layers, in the order that functions take them."""
    return relu.fc1.weight, relu.fc1.bias, relu.fc2.weight, relu.fc2.bias

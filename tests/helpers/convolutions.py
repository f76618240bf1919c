"""Single deformable convolutions of any sizes, and the strange arguments that they must take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.compare import leaf

Pair = tuple[int, int]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, torch.full_like(t, 1e9)], 3)[..., : t.shape[3]],
    "strided": lambda t: torch.stack([t, torch.full_like(t, 1e9)], -1).flatten(3)[..., ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@dataclass(frozen=True)
class PlainConvolution:
    """Sizes of one convolution; `margin` pixels more than its dilated kernel needs."""

    batch: int = 2
    groups: int = 1
    deform_groups: int = 1
    in_multiple: int = 2
    out_multiple: int = 3
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    margin: Pair = (3, 2)
    mask: bool = True
    bias: bool = True
    seed: int = 0

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Random arguments, with all sample coordinates at least 0.05 away from integers."""
        source = torch.Generator().manual_seed(self.seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=source, dtype=torch.float64)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        size = [
            max(1, d * (k - 1) + 1 - 2 * p) + m
            for k, p, d, m in zip(
                self.kernel, self.padding, self.dilation, self.margin, strict=True
            )
        ]
        out = [
            (s + 2 * p - d * (k - 1) - 1) // st_ + 1
            for s, k, p, d, st_ in zip(
                size, self.kernel, self.padding, self.dilation, self.stride, strict=True
            )
        ]
        taps = math.prod(self.kernel)
        channels = math.lcm(self.groups, self.deform_groups) * self.in_multiple
        out_channels = self.groups * self.out_multiple
        positions = (self.batch, 2 * self.deform_groups * taps, *out)
        offset = (5 * normal(*positions) / 3).floor() + 0.05 + 0.9 * uniform(*positions)
        tensors = {
            "input": normal(self.batch, channels, *size),
            "offset": offset,
            "weight": normal(out_channels, channels // self.groups, *self.kernel),
        }
        if self.bias:
            tensors["bias"] = normal(out_channels)
        if self.mask:
            tensors["mask"] = uniform(self.batch, self.deform_groups * taps, *out)
        return {name: leaf(t, dtype) for name, t in tensors.items()}

    def run(self, operator: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor:
        return operator(**tensors, stride=self.stride, padding=self.padding, dilation=self.dilation)


def pairs(least: int, most: int) -> st.SearchStrategy[Pair]:
    value = st.integers(least, most)
    return st.tuples(value, value)

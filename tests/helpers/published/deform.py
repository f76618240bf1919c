"""The public modulated deformable convolutions, with the memory reads of their kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


def read_contiguous(t: Tensor, height: int, width: int) -> Tensor:
    """What the public kernels read of a prediction: each sample's memory from its first value on,
    taken as contiguous [K, height, width] whatever the tensor's shape and strides are."""
    n, k = t.shape[:2]
    return t.as_strided((n, k, height, width), (t.stride(0), height * width, width, 1))


class _DeformConv(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, stride: Any, bias: bool, **settings: Any
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding, self.dilation = settings.get("padding", 1), settings.get("dilation", 1)
        self.groups, size = settings.get("groups", 1), settings.get("kernel_size", 3)
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // self.groups, size, size)
        )
        bound = 1 / math.sqrt(in_channels * size**2)
        nn.init.uniform_(self.weight, -bound, bound)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if bias else None)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        stride = self.stride if isinstance(self.stride, int) else self.stride[0]
        size = [(s - 1) // stride + 1 for s in x.shape[-2:]]
        return deform_conv2d(
            x,
            read_contiguous(offset, *size),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            read_contiguous(mask, *size),
        )


class ModulatedDeformConv(_DeformConv):
    """That of DynamicHead and GLIP: integers as settings, a bias."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, **settings: Any
    ) -> None:
        super().__init__(in_channels, out_channels, stride, settings.pop("bias", True), **settings)
        self.deformable_groups = settings.get("deformable_groups", 1)


class ModulatedDeformConv2d(_DeformConv):
    """That of mmcv: pairs as settings."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__(
            in_channels, out_channels, (stride, stride), bias, padding=(1, 1), dilation=(1, 1)
        )
        self.deform_groups = 1

"""The structure of mmdet's DyHead neck, as released."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.published.deform import ModulatedDeformConv2d


class HSigmoid(nn.Module):
    """mmcv's: clamp((x + bias) / divisor)."""

    def __init__(self, bias: float = 3.0, divisor: float = 6.0) -> None:
        super().__init__()
        self.bias, self.divisor = bias, divisor
        self.min_value, self.max_value = 0.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return ((x + self.bias) / self.divisor).clamp(self.min_value, self.max_value)


class ConvModule(nn.Module):
    """mmcv's, with a 1x1 convolution and no norm."""

    def __init__(self, in_channels: int, out_channels: int, activate: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.conv(x))


class DyReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.expansion = channels, 4
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = ConvModule(channels, channels // 4, nn.ReLU(inplace=True))
        self.conv2 = ConvModule(channels // 4, channels * self.expansion, HSigmoid())

    def forward(self, x: Tensor) -> Tensor:
        t = self.conv2(self.conv1(self.global_avgpool(x))) - 0.5
        slope1, shift1, slope2, shift2 = t.chunk(4, dim=1)
        return torch.maximum(x * (1 + 2 * slope1) + shift1, x * (2 * slope2) + shift2)


class DyDCNv2(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, with_norm: bool = True
    ) -> None:
        super().__init__()
        self.with_norm = with_norm
        self.conv = ModulatedDeformConv2d(in_channels, out_channels, stride, bias=not with_norm)
        if with_norm:
            self.norm = nn.GroupNorm(16, out_channels)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        x = self.conv(x.contiguous(), offset, mask)
        return self.norm(x) if self.with_norm else x


class DyHeadBlockStructure(nn.Module):
    """What the released block and that of the main branch have in common."""

    def __init__(
        self, in_channels: int, out_channels: int, zero_init_offset: bool = True, **act: float
    ) -> None:
        super().__init__()
        self.zero_init_offset = zero_init_offset
        self.offset_and_mask_dim, self.offset_dim = 27, 18
        self.spatial_conv_high = DyDCNv2(in_channels, out_channels)
        self.spatial_conv_mid = DyDCNv2(in_channels, out_channels)
        self.spatial_conv_low = DyDCNv2(in_channels, out_channels, stride=2)
        self.spatial_conv_offset = nn.Conv2d(in_channels, 27, 3, padding=1)
        self.scale_attn_module = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(out_channels, 1, 1),
            nn.ReLU(inplace=True),
            HSigmoid(**act),
        )
        self.task_attn_module = DyReLU(out_channels)
        if zero_init_offset:
            for parameter in self.spatial_conv_offset.parameters():
                nn.init.zeros_(parameter)

    def run_level(
        self, x: Any, level: int, prediction: Tensor, high: tuple[Tensor, Tensor]
    ) -> Tensor:
        gate = self.scale_attn_module
        offset, mask = prediction[:, :18], prediction[:, 18:].sigmoid()
        branches = [self.spatial_conv_mid(x[level], offset, mask)]
        if level > 0:
            branches.append(self.spatial_conv_low(x[level - 1], offset, mask))
        if level + 1 < len(x):
            coarser, size = self.spatial_conv_high(x[level + 1], *high), x[level].shape[-2:]
            branches.append(F.interpolate(coarser, size, mode="bilinear", align_corners=True))
        total = torch.stack([gate(branch) * branch for branch in branches]).sum(0)
        return self.task_attn_module(total / len(branches))


class DyHeadBlock(DyHeadBlockStructure):
    """The released block: takes a list or tuple of levels and returns a list."""

    def forward(self, x: Any) -> list[Tensor]:
        outs = []
        for level in range(len(x)):
            prediction = self.spatial_conv_offset(x[level])
            high = prediction[:, :18], prediction[:, 18:].sigmoid()
            outs.append(self.run_level(x, level, prediction, high))
        return outs


class DyHead(nn.Module):
    block: type[DyHeadBlockStructure] = DyHeadBlock

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int = 6, **settings: Any
    ) -> None:
        super().__init__()
        self.dyhead_blocks = nn.Sequential(
            *(
                self.block(out_channels if i else in_channels, out_channels, **settings)
                for i in range(num_blocks)
            )
        )

    def forward(self, inputs: Any) -> tuple[Tensor, ...]:
        return tuple(self.dyhead_blocks(inputs))

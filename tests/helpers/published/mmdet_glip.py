"""The structure of mmdet's GLIP: the blocks of its head for grounded detection.

The mathematics are GLIP's; the names and the activation modules are others, and the operator is
mmcv's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.published.deform import ModulatedDeformConv2d
from tests.helpers.published.glip_language import BertEncoderLayer, VLFuse


class Conv3x3Norm(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = ModulatedDeformConv2d(channels, out_channels, stride)
        self.bn = nn.GroupNorm(16, out_channels)

    def forward(self, x: Tensor, **read: Tensor) -> Tensor:
        return self.bn(self.conv(x, **read))


class DyReLU(nn.Module):
    """Two lines, whose constants stand in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand_ratio, self.out_channels = 4, channels
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 4),
            nn.ReLU(inplace=True),
            nn.Linear(channels // 4, 4 * channels),
            nn.Hardsigmoid(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        t = self.fc(self.avg_pool(x).flatten(1)) - 0.5
        slope1, shift1, slope2, shift2 = t[..., None, None].chunk(4, dim=1)
        return torch.maximum(x * (1 + 2 * slope1) + shift1, x * (2 * slope2) + shift2)


class DyConv(nn.Module):
    """Takes and returns {"visual": levels, "lang": anything}."""

    def __init__(self, in_channels: int, out_channels: int, use_dyfuse: bool = True) -> None:
        super().__init__()
        self.dyconvs = nn.ModuleList(Conv3x3Norm(in_channels, out_channels, s) for s in (1, 1, 2))
        self.attnconv: nn.Sequential | None = None
        if use_dyfuse:
            self.attnconv = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, 1, 1), nn.ReLU(inplace=True)
            )
            self.h_sigmoid = nn.Hardsigmoid(inplace=True)
        self.relu = DyReLU(out_channels)
        self.offset = nn.Conv2d(in_channels, 27, 3, 1, 1)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        levels = inputs["visual"]
        outs = []
        for level, x in enumerate(levels):
            prediction = self.offset(x)
            read = {"offset": prediction[:, :18], "mask": prediction[:, 18:].sigmoid()}
            branches = [self.dyconvs[1](x, **read)]
            if level > 0:
                branches.append(self.dyconvs[2](levels[level - 1], **read))
            if level + 1 < len(levels):
                coarser = self.dyconvs[0](levels[level + 1], **read)
                size = x.shape[-2:]
                branches.append(F.interpolate(coarser, size, mode="bilinear", align_corners=True))
            assert self.attnconv is not None
            gates = self.h_sigmoid(torch.stack([self.attnconv(branch) for branch in branches]))
            outs.append(self.relu((gates * torch.stack(branches)).mean(0)))
        return {"visual": outs, "lang": inputs["lang"]}


class VLFusionModule(nn.Module):
    """The head: its blocks stand at 2, 5, 8, ... of the tower."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_blocks):
            layers += [VLFuse(channels), BertEncoderLayer(), DyConv(channels, channels)]
        self.dyhead_tower = nn.Sequential(*layers)

    def forward(self, x: list[Tensor], lang: dict[str, Tensor]) -> dict[str, Any]:
        return self.dyhead_tower({"visual": x, "lang": lang})

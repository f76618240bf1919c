"""What the DyConv of microsoft/DynamicHead and GLIP's two have in common: all but containers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.published.deform import ModulatedDeformConv


class h_sigmoid(nn.Module):
    def __init__(self, h_max: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)
        self.h_max = h_max

    def forward(self, x: Tensor) -> Tensor:
        return self.h_max * self.relu(3 + x) / 6


class DYReLU(nn.Module):
    """Dynamic ReLU with two lines and biases."""

    def __init__(self, channels: int, **settings: Any) -> None:
        super().__init__()
        self.oup = channels
        self.lambda_a = 2 * settings.get("lambda_a", 1.0)
        self.K2, self.use_bias, self.exp = settings.get("K2", True), True, 4
        self.init_a, self.init_b = settings.get("init_a", [1.0, 0.0]), [0.0, 0.0]
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 4),
            nn.ReLU(inplace=True),
            nn.Linear(channels // 4, channels * self.exp),
            h_sigmoid(),
        )
        self.spa = nn.Conv2d(channels, 1, 1) if settings.get("use_spatial") else None

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        source, target = x if isinstance(x, list) else (x, x)
        t = self.fc(self.avg_pool(source).flatten(1)) - 0.5
        slope1, shift1, slope2, shift2 = t[..., None, None].chunk(4, dim=1)
        first = target * (self.lambda_a * slope1 + self.init_a[0]) + shift1 + self.init_b[0]
        second = target * (self.lambda_a * slope2 + self.init_a[1]) + shift2 + self.init_b[1]
        return torch.maximum(first, second)


class Conv3x3Norm(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, stride: int, deform: bool, norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv: nn.Module
        if deform:
            self.conv = ModulatedDeformConv(in_channels, out_channels, stride)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        self.bn = norm

    def forward(self, x: Tensor, **read: Tensor) -> Tensor:
        x = self.conv(x, **read)
        return x if self.bn is None else self.bn(x)


def _norm(kind: str | None, channels: int, groups: int) -> nn.Module | None:
    if kind is None:
        return None
    return nn.BatchNorm2d(channels) if kind == "bn" else nn.GroupNorm(groups, channels)


class DyConvStructure(nn.Module):
    """A DyConv without its forward; microsoft's has the default settings."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: str | None = "gn",
        groups: int = 16,
        use_dyfuse: bool = True,
        use_dyrelu: bool = True,
        use_deform: bool = True,
    ) -> None:
        super().__init__()
        self.DyConv = nn.ModuleList(
            Conv3x3Norm(
                in_channels, out_channels, stride, use_deform, _norm(norm, out_channels, groups)
            )
            for stride in (1, 1, 2)
        )
        self.AttnConv: nn.Sequential | None = None
        if use_dyfuse:
            self.AttnConv = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_channels, 1, 1), nn.ReLU(inplace=True)
            )
            self.h_sigmoid = h_sigmoid()
        self.relu = DYReLU(out_channels) if use_dyrelu else nn.ReLU()
        self.offset = nn.Conv2d(in_channels, 27, 3, 1, 1) if use_deform else None

    def run_level(self, levels: list[Tensor], level: int) -> Tensor:
        x, read = levels[level], {}
        if self.offset is not None:
            prediction = self.offset(x)
            read = {"offset": prediction[:, :18], "mask": prediction[:, 18:].sigmoid()}
        branches = [self.DyConv[1](x, **read)]
        if level > 0:
            branches.append(self.DyConv[2](levels[level - 1], **read))
        if level + 1 < len(levels):
            coarser = self.DyConv[0](levels[level + 1], **read)
            branches.append(
                F.interpolate(coarser, x.shape[-2:], mode="bilinear", align_corners=True)
            )
        if self.AttnConv is not None:
            branches = [self.h_sigmoid(self.AttnConv(branch)) * branch for branch in branches]
        return self.relu(torch.stack(branches).mean(0))

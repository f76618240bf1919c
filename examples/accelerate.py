"""A model that is there already: its blocks are measured and replaced, its parameters stay.

The block here is a fork with the names that forks of YOLO use, on torchvision's operator. That
operator takes offsets of the output's size only, so the coarser level is resized before it is
read. accelerate finds out which variant that is: it compares numbers, not names.

    python examples/accelerate.py
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

import dyhead_cuda


class DyDCNv2(nn.Module):
    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = DeformConv2d(channels, channels, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(16, channels)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.conv(x, offset, mask))


class DyReLU(nn.Module):
    expand_ratio = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        fc1, fc2 = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, 4 * channels)
        self.fc = nn.Sequential(fc1, nn.ReLU(), fc2, nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        t = 2 * self.fc(self.avg_pool(x).flatten(1)) - 1
        a1, b1, a2, b2 = t[:, :, None, None].chunk(4, 1)
        return torch.maximum((1 + a1) * x + b1 / 2, a2 * x + b2 / 2)


class DyHeadBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial_conv_high = DyDCNv2(channels)
        self.spatial_conv_mid = DyDCNv2(channels)
        self.spatial_conv_low = DyDCNv2(channels, stride=2)
        self.spatial_conv_offset = nn.Conv2d(channels, 27, 3, padding=1)
        pool, gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 1, 1)
        self.scale_attn_module = nn.Sequential(pool, gate, nn.ReLU(), nn.Hardsigmoid())
        self.task_attn_module = DyReLU(channels)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        outs = []
        for i, x in enumerate(levels):
            offset, mask = self.spatial_conv_offset(x).split([18, 9], 1)
            read = offset, mask.sigmoid()
            branches = [self.spatial_conv_mid(x, *read)]
            if i > 0:
                branches.append(self.spatial_conv_low(levels[i - 1], *read))
            if i + 1 < len(levels):
                coarser = F.interpolate(levels[i + 1], x.shape[2:], None, "bilinear", True)
                branches.append(self.spatial_conv_high(coarser, *read))
            total = sum(self.scale_attn_module(branch) * branch for branch in branches)
            outs.append(self.task_attn_module(total / len(branches)))
        return outs


logging.basicConfig(level=logging.INFO, format="%(message)s")  # says what was measured
torch.manual_seed(0)
model = nn.Sequential(DyHeadBlock(32), DyHeadBlock(32)).eval()
levels = [torch.randn(1, 32, 32 >> i, 48 >> i) for i in range(3)]
with torch.no_grad():
    before = model(levels)
    model = dyhead_cuda.accelerate(model)
    after = model(levels)
torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
print("the same numbers, from", type(model[0]).__name__)

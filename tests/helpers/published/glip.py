"""The structure of GLIP's plain head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.helpers.published.dyconv import DyConvStructure


class DyConv(DyConvStructure):
    """Takes and returns a list of levels, finest first."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [self.run_level(x, level) for level in range(len(x))]


class DyHead(nn.Module):
    """The plain head: the tower and its prediction layers."""

    def __init__(self, channels: int, num_blocks: int, **settings: Any) -> None:
        super().__init__()
        self.dyhead_tower = nn.Sequential(
            *(DyConv(channels, channels, **settings) for _ in range(num_blocks))
        )
        self.cls_logits = nn.Conv2d(channels, 3, 1)
        self.bbox_pred = nn.Conv2d(channels, 4, 1)
        self.centerness = nn.Conv2d(channels, 1, 1)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [self.cls_logits(level) for level in self.dyhead_tower(x)]

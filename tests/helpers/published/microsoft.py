"""The structure of microsoft/DynamicHead: a tower of DyConv behind a backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.helpers.published.dyconv import DyConvStructure


class DyConv(DyConvStructure):
    """Takes and returns a dict of levels, finest first."""

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        levels = list(x.values())
        return {name: self.run_level(levels, index) for index, name in enumerate(x)}


class DyHead(nn.Module):
    """A backbone (here any module that returns a dict of levels) and the tower."""

    def __init__(self, backbone: nn.Module, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.dyhead_tower = nn.Sequential(*(DyConv(channels, channels) for _ in range(num_blocks)))

    def forward(self, x: Any) -> dict[str, Tensor]:
        return self.dyhead_tower(self.backbone(x))

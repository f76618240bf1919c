"""The structure of GLIP's language-aware head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.published.dyconv import DyConvStructure


class DyConv(DyConvStructure):
    """Takes and returns {"visual": levels, "lang": anything}."""

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        levels = inputs["visual"]
        visual = [self.run_level(levels, level) for level in range(len(levels))]
        return {"visual": visual, "lang": inputs["lang"]}


class VLFuse(nn.Module):
    """Stands between the blocks; adds the mean of the language features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shrink_lang = nn.Linear(8, channels)

    def forward(self, x: dict[str, Any]) -> dict[str, Any]:
        shift = self.shrink_lang(x["lang"]["hidden"].mean(1))[..., None, None]
        return {"visual": [level + shift for level in x["visual"]], "lang": x["lang"]}


class BertEncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.intermediate = nn.Linear(8, 8)

    def forward(self, x: dict[str, Any]) -> dict[str, Any]:
        hidden = x["lang"]["hidden"] + self.intermediate(x["lang"]["hidden"])
        return {"visual": x["visual"], "lang": {**x["lang"], "hidden": hidden}}


class VLDyHead(nn.Module):
    """The language-aware head: its blocks stand at 2, 5, 8, ... of the tower."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_blocks):
            layers += [VLFuse(channels), BertEncoderLayer(), DyConv(channels, channels)]
        self.dyhead_tower = nn.Sequential(*layers)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: list[Tensor], lang: dict[str, Tensor]) -> dict[str, Any]:
        return self.dyhead_tower({"visual": x, "lang": lang})

"""mmdet's main branch since commit 15a558d: offset and mask of the coarser level are cropped.

The operator reads the memory behind the cropped offset as if it were contiguous, so the crop of
the offset has no effect on what it reads; the mask is a new tensor after its sigmoid.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.helpers.published import mmdet


class DyHeadBlock(mmdet.DyHeadBlockStructure):
    def forward(self, x: Any) -> list[Tensor]:
        outs = []
        for level in range(len(x)):
            prediction = self.spatial_conv_offset(x[level])
            out_h, out_w = x[min(level + 1, len(x) - 1)].shape[-2:]
            offset = prediction[:, :18, :out_h, :out_w]
            mask = prediction[:, 18:, :out_h, :out_w].sigmoid().contiguous()
            outs.append(self.run_level(x, level, prediction, (offset, mask)))
        return outs


class DyHead(mmdet.DyHead):
    block = DyHeadBlock

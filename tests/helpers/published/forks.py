"""Forks of the published block that keep its names and change its forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from tests.helpers.published.dyconv import DyConvStructure


class Fork(DyConvStructure):
    """The published forward, cut where forks differ: what the coarser branch reads and gives."""

    def coarser(self, x: Tensor, coarser: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def run(self, levels: list[Tensor]) -> list[Tensor]:
        assert self.AttnConv is not None
        assert self.offset is not None
        outs = []
        for level, x in enumerate(levels):
            prediction = self.offset(x)
            offset, mask = prediction[:, :18], prediction[:, 18:].sigmoid()
            branches = [self.DyConv[1](x, offset=offset, mask=mask)]
            if level > 0:
                branches.append(self.DyConv[2](levels[level - 1], offset=offset, mask=mask))
            if level + 1 < len(levels):
                branches.append(self.coarser(x, levels[level + 1], offset, mask))
            gated = [self.h_sigmoid(self.AttnConv(branch)) * branch for branch in branches]
            outs.append(self.relu(torch.stack(gated).mean(0)))
        return outs


def _nearest(self: Any, x: Tensor, coarser: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """F.interpolate without a mode, as YOLO forks call it."""
    branch = self.DyConv[0](coarser, offset=offset, mask=mask)
    return F.interpolate(branch, size=[x.size(2), x.size(3)])


def _cropped(self: Any, x: Tensor, coarser: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """GLIP on detectron2, whose operator refuses offsets of another size."""
    h, w = coarser.shape[-2:]
    read = {"offset": offset[:, :, :h, :w].contiguous(), "mask": mask[:, :, :h, :w].contiguous()}
    branch = self.DyConv[0](coarser, **read)
    return F.interpolate(branch, x.shape[-2:], mode="bilinear", align_corners=True)


def _aligned(self: Any, x: Tensor, coarser: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """On torchvision's operator: the coarser level is resized before it is read."""
    resized = F.interpolate(coarser, x.shape[-2:], mode="bilinear", align_corners=True)
    return self.DyConv[0](resized, offset=offset, mask=mask)


def _doubled(self: Any, x: Tensor, coarser: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """A factor for the size: runs only where every level is exactly half of the finer one."""
    branch = self.DyConv[0](coarser, offset=offset, mask=mask)
    return F.interpolate(branch, scale_factor=2)


def _half_pixel(self: Any, x: Tensor, coarser: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Bilinear with align_corners=False, which no variant of this package computes."""
    branch = self.DyConv[0](coarser, offset=offset, mask=mask)
    return F.interpolate(branch, x.shape[-2:], mode="bilinear", align_corners=False)


def _gpu_only(self: Any, x: Tensor, coarser: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """An operator without a CPU kernel."""
    raise RuntimeError("modulated deform conv is not implemented on the CPU")


def fork(name: str, channels: int) -> nn.Module:
    """A block of the fork ``name``; it takes a dict of levels, except "cropped" (GLIP's form)."""
    coarser = {
        "nearest": _nearest,
        "cropped": _cropped,
        "aligned": _aligned,
        "doubled": _doubled,
        "half_pixel": _half_pixel,
        "gpu_only": _gpu_only,
    }[name]

    def named(self: Any, x: dict[Any, Tensor]) -> dict[Any, Tensor]:
        return dict(zip(x.keys(), self.run(list(x.values())), strict=True))

    def visual(self: Any, x: dict[str, Any]) -> dict[str, Any]:
        return {"visual": self.run(x["visual"]), "lang": x["lang"]}

    forward = visual if name == "cropped" else named
    block = type("DyConv", (Fork,), {"coarser": coarser, "forward": forward})(channels, channels)
    if name == "aligned":
        for branch, stride in zip(block.DyConv, (1, 1, 2), strict=True):
            branch.conv = DeformConv2d(channels, channels, 3, stride, 1)
    return block

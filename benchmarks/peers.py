"""The published block layer by layer, as people run it today: one call per layer, level and branch.

The deformable convolution is torchvision's, or mmcv's where that is installed. torchvision checks
the sizes that mmcv does not, so the offsets of the coarser branch are reshaped to what the
published operator reads of them (``high_offset="flat"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from dyhead_cuda.pyramid import OFFSET_CHANNELS, BlockParameters, BranchParameters

# (input, offset, mask, weight, bias, stride) -> output, 3x3 with padding 1
DeformConv = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", int], Tensor]


def torchvision_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, stride: int
) -> Tensor:
    return torchvision.ops.deform_conv2d(x, offset, weight, bias, stride, 1, 1, mask)


def deform_convs() -> dict[str, DeformConv]:
    """The operators that are installed, by name."""
    found: dict[str, DeformConv] = {"torchvision": torchvision_conv}
    if find_spec("mmcv") is not None:
        from mmcv.ops import modulated_deform_conv2d

        def mmcv_conv(
            x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Any, stride: int
        ) -> Tensor:
            return modulated_deform_conv2d(x, offset, mask, weight, bias, stride, 1, 1, 1, 1)

        found["mmcv"] = mmcv_conv
    return found


def _first_values(t: Tensor, size: Sequence[int]) -> Tensor:
    n, k = t.shape[:2]
    return t.flatten(1)[:, : k * size[0] * size[1]].reshape(n, k, *size)


def published_block(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    deform_conv: DeformConv,
    num_groups: int = 16,
) -> list[Tensor]:
    """One block; arguments as for :func:`dyhead_cuda.functional.pyramid_block`."""
    p = parameters

    def branch(
        x: Tensor, q: BranchParameters, offset: Tensor, mask: Tensor, stride: int = 1
    ) -> Tensor:
        y = deform_conv(x, offset, mask, q.weight, q.bias, stride)
        return F.group_norm(y, num_groups, q.norm_weight, q.norm_bias)

    outputs = []
    for level, x in enumerate(features):
        predictions = F.conv2d(x, p.offset_weight, p.offset_bias, padding=1)
        offset = predictions[:, :OFFSET_CHANNELS].contiguous()
        mask = predictions[:, OFFSET_CHANNELS:].sigmoid()
        branches = [branch(x, p.mid, offset, mask)]
        if level > 0:
            branches.append(branch(features[level - 1], p.low, offset, mask, 2))
        if level + 1 < len(features):
            coarser = features[level + 1]
            size = coarser.shape[2:]
            high = branch(coarser, p.high, _first_values(offset, size), _first_values(mask, size))
            branches.append(F.interpolate(high, x.shape[2:], mode="bilinear", align_corners=True))
        stacked = torch.stack(branches)
        pooled = [F.adaptive_avg_pool2d(b, 1) for b in branches]
        gates = [F.relu(F.conv2d(m, p.gate_weight.view(1, -1, 1, 1), p.gate_bias)) for m in pooled]
        gate = F.relu6(torch.stack(gates) + 3) / 6
        outputs.append(_dynamic_relu((stacked * gate).mean(0), p))
    return outputs


def _dynamic_relu(x: Tensor, p: BlockParameters) -> Tensor:
    n, channels = x.shape[:2]
    pooled = F.adaptive_avg_pool2d(x, 1).view(n, channels)
    hidden = F.relu(F.linear(pooled, p.fc1_weight, p.fc1_bias))
    gate = F.relu6(F.linear(hidden, p.fc2_weight, p.fc2_bias) + 3) / 6
    a1, b1, a2, b2 = gate.view(n, 4 * channels, 1, 1).split(channels, dim=1)
    first = x * ((a1 - 0.5) * 2 + 1) + (b1 - 0.5)
    return torch.max(first, x * ((a2 - 0.5) * 2) + (b2 - 0.5))


def blocks() -> dict[str, Callable[..., list[Tensor]]]:
    """Published blocks on every operator that is installed, by name."""
    return {
        name: partial(published_block, deform_conv=operator)
        for name, operator in deform_convs().items()
    }

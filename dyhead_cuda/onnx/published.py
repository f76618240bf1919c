"""The published form: blocks on a pyramid of feature maps, as ONNX nodes.

What is small is done for all branches and levels at once: the gates, and the layers of the dynamic
ReLU. A normalised branch is averaged once; since gates and average are linear, the mean that the
dynamic ReLU needs follows from the means of the branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda.numerics import to_compute
from dyhead_cuda.onnx import nodes
from dyhead_cuda.onnx.operators import coefficients, larger_line
from dyhead_cuda.pyramid import BlockParameters, BranchParameters, HighOffset, Upsample, halved

MODES: dict[Upsample, nodes.Mode] = {"bilinear": nodes.ALIGNED, "nearest": nodes.NEAREST}

Read = Callable[[Tensor, nodes.Area], Tensor]
# How the high branch reads offset and mask, by the name of the variant. "aligned" resizes the
# coarser level instead, and reads the predictions as they are.
READ_RULES: dict[HighOffset, tuple[Read, Read]] = {
    "flat": (nodes.flat_prefix, nodes.flat_prefix),
    "crop": (nodes.crop, nodes.crop),
    "mmdet_main": (nodes.flat_prefix, nodes.crop),
}


def _resize(x: Tensor, area: nodes.Area, upsample: Upsample) -> Tensor:
    return nodes.resize(x, area.size, area.shape, MODES[upsample])


def _finer_for_low(finer: Tensor, area: nodes.Area) -> Tensor:
    """The finer level as ``low`` reads it; see :func:`dyhead_cuda.numerics.finer_for_low`."""
    if halved(finer.shape) == tuple(area.shape):
        return finer
    height, width = area.shape
    return nodes.resize(finer, area.size * 2, (2 * height, 2 * width), nodes.ALIGNED)


def _branches(
    levels: Sequence[Tensor],
    areas: Sequence[nodes.Area],
    p: BlockParameters,
    high_offset: HighOffset,
    upsample: Upsample,
    num_groups: int,
    eps: float,
) -> list[list[Tensor]]:
    """The normalised branches [N, C_out, H_l, W_l] of each level."""

    def branch(
        x: Tensor, parameters: BranchParameters, offset: Tensor, mask: Tensor, stride: int = 1
    ) -> Tensor:
        weight, bias, norm_weight, norm_bias = parameters
        y = nodes.deform_conv(x, weight, offset, bias, mask, stride=(stride, stride))
        # The exporter makes one node of this from opset 21 on, and six before.
        return torch.group_norm(y, num_groups, norm_weight, norm_bias, eps)

    found = []
    for level, (x, area) in enumerate(zip(levels, areas, strict=True)):
        predictions = F.conv2d(x, p.offset_weight, p.offset_bias, padding=1)
        offset, mask = nodes.offset_and_mask(predictions, area.constants)
        branches = [branch(x, p.mid, offset, mask)]
        if level > 0:
            finer = _finer_for_low(levels[level - 1], area)
            branches.append(branch(finer, p.low, offset, mask, stride=2))
        if level + 1 < len(levels):
            coarser = levels[level + 1]
            if high_offset == "aligned":
                branches.append(branch(_resize(coarser, area, upsample), p.high, offset, mask))
            else:
                read_offset, read_mask = READ_RULES[high_offset]
                small = areas[level + 1]
                y = branch(coarser, p.high, read_offset(offset, small), read_mask(mask, small))
                branches.append(_resize(y, area, upsample))
        found.append(branches)
    return found


def _block(
    levels: Sequence[Tensor],
    areas: Sequence[nodes.Area],
    p: BlockParameters,
    high_offset: HighOffset,
    upsample: Upsample,
    num_groups: int,
    eps: float,
) -> list[Tensor]:
    """One block, from levels to [N, C_out, H_l, W_l]."""
    branches = _branches(levels, areas, p, high_offset, upsample, num_groups, eps)
    counts = [len(of_level) for of_level in branches]
    every = [y for of_level in branches for y in of_level]

    # All branches are the columns of one small map, [N, C_out, branches, 1].
    means = torch.cat([y.mean((2, 3), keepdim=True) for y in every], dim=2)
    gate = F.conv2d(means, p.gate_weight.view(1, -1, 1, 1), p.gate_bias)
    gates = F.hardsigmoid(F.relu(gate))  # [N, 1, branches, 1]
    each = iter(nodes.split(gates, len(every), 2))
    combined = [nodes.mean([next(each) * y for y in of_level]) for of_level in branches]

    # And all levels those of another one, [N, C_out, levels, 1].
    belongs = [
        [1 / count if owner == level else 0.0 for owner, n in enumerate(counts) for _ in range(n)]
        for level, count in enumerate(counts)
    ]
    average = torch.tensor(belongs, dtype=means.dtype, device=means.device)
    level_means = average @ (gates * means)
    hidden = F.relu(F.conv2d(level_means, p.fc1_weight[:, :, None, None], p.fc1_bias))
    logits = F.conv2d(hidden, p.fc2_weight[:, :, None, None], p.fc2_bias)
    of_levels = zip(
        *(nodes.split(t, len(levels), 2) for t in coefficients(logits, "hsigmoid")),
        strict=True,
    )
    return [larger_line(x, *lines) for x, lines in zip(combined, of_levels, strict=True)]


def pyramid_blocks(
    features: Sequence[Tensor],
    blocks: Sequence[BlockParameters],
    *,
    high_offset: HighOffset,
    upsample: Upsample,
    num_groups: int,
    eps: float,
) -> list[Tensor]:
    """Published blocks in turn; see :func:`dyhead_cuda.functional.pyramid_blocks`."""
    constants = nodes.Constants()
    areas = [nodes.Area(x, constants) for x in features]
    levels = [to_compute(x) for x in features]
    for parameters in blocks:
        p = parameters.to(levels[0].dtype)
        levels = _block(levels, areas, p, high_offset, upsample, num_groups, eps)
    return [out.to(x.dtype) for out, x in zip(levels, features, strict=True)]

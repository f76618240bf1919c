"""What people run today: the published layers one by one, on the operators that are installed.

The deformable convolution is torchvision's, or mmcv's where that is there. torchvision checks the
sizes that mmcv does not, so the offsets of the coarser branch are reshaped to what the published
operator reads of them (``high_offset="flat"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_cuda import checks
from dyhead_cuda.pyramid import OFFSET_CHANNELS, BlockParameters, BranchParameters
from dyhead_cuda.reference import UnifiedParameters, median_level, scale_attention

# (input, offset, mask, weight, bias, stride) -> output, 3x3 with padding 1
DeformConv = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", int], Tensor]


@cache
def deform_convs() -> dict[str, DeformConv]:
    """The operators that are installed, by the name of their package."""
    found: dict[str, DeformConv] = {}
    if find_spec("torchvision") is not None:
        from torchvision.ops import deform_conv2d

        found["torchvision"] = lambda x, offset, mask, weight, bias, stride: deform_conv2d(
            x, offset, weight, bias, stride, 1, 1, mask
        )
    if find_spec("mmcv") is not None and find_spec("mmcv.ops") is not None:
        from mmcv.ops import modulated_deform_conv2d

        found["mmcv"] = lambda x, offset, mask, weight, bias, stride: modulated_deform_conv2d(
            x, offset, mask, weight, bias, stride, 1, 1, 1, 1
        )
    return found


@cache
def supports(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the operator of :func:`deform_convs` runs in ``dtype`` there."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    x, offset, mask = zeros(1, 8, 3, 3), zeros(1, 18, 3, 3), zeros(1, 9, 3, 3)
    try:
        deform_convs()[name](x, offset, mask, zeros(8, 8, 3, 3), zeros(8), 1)
    except NotImplementedError:  # what torch raises for a type without a kernel
        return False
    return True


def first_values(t: Tensor, size: Sequence[int]) -> Tensor:
    """The first K * h * w values of each image's [K, H, W], as [K, h, w]."""
    n, k = t.shape[:2]
    return t.flatten(1)[:, : k * size[0] * size[1]].reshape(n, k, *size)


def deform_branches(
    features: Sequence[Tensor],
    offsets: Sequence[Tensor],
    masks: Sequence[Tensor],
    branches: Sequence[tuple[Tensor, Tensor | None]],
    deform_conv: DeformConv,
) -> list[list[Tensor]]:
    """Per level the deformable convolutions mid, low and high, as far as the level has them.

    Args:
        features: levels [N, C_in, H_l, W_l].
        offsets, masks: [N, 18, H_l, W_l] and [N, 9, H_l, W_l], after the sigmoid.
        branches: weight and bias of low, mid and high.
        deform_conv: the operator.
    """
    low, mid, high = branches
    maps = []
    for level, x in enumerate(features):
        offset, mask = offsets[level], masks[level]
        found = [deform_conv(x, offset, mask, *mid, 1)]
        if level > 0:
            found.append(deform_conv(features[level - 1], offset, mask, *low, 2))
        if level + 1 < len(features):
            coarser = features[level + 1]
            size = coarser.shape[2:]
            read = first_values(offset, size), first_values(mask, size)
            found.append(deform_conv(coarser, *read, *high, 1))
        maps.append(found)
    return maps


def upsampled(y: Tensor, size: Sequence[int]) -> Tensor:
    """``y`` at ``size``, as the published code brings the coarser branch there."""
    if y.shape[2:] == tuple(size):
        return y
    return F.interpolate(y, tuple(size), mode="bilinear", align_corners=True)


def published_block(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    deform_conv: DeformConv,
    num_groups: int,
) -> list[Tensor]:
    """One block; arguments as for :func:`dyhead_cuda.functional.pyramid_block`."""
    p = parameters
    offsets, masks = [], []
    for x in features:
        predictions = F.conv2d(x, p.offset_weight, p.offset_bias, padding=1)
        offsets.append(predictions[:, :OFFSET_CHANNELS].contiguous())
        masks.append(predictions[:, OFFSET_CHANNELS:].sigmoid())
    branches = [(q.weight, q.bias) for q in (p.low, p.mid, p.high)]
    maps = deform_branches(features, offsets, masks, branches, deform_conv)

    def normalised(y: Tensor, q: BranchParameters, size: Sequence[int]) -> Tensor:
        return upsampled(F.group_norm(y, num_groups, q.norm_weight, q.norm_bias), size)

    outputs = []
    for level, (x, found) in enumerate(zip(features, maps, strict=True)):
        kinds = [p.mid, *([p.low] if level > 0 else []), p.high]
        size = x.shape[2:]
        stacked = torch.stack([normalised(y, q, size) for y, q in zip(found, kinds, strict=False)])
        pooled = [F.adaptive_avg_pool2d(b, 1) for b in stacked]
        gates = [F.relu(F.conv2d(m, p.gate_weight.view(1, -1, 1, 1), p.gate_bias)) for m in pooled]
        gate = F.relu6(torch.stack(gates) + 3) / 6
        outputs.append(dynamic_relu((stacked * gate).mean(0), *p.task()))
    return outputs


def dynamic_relu(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """max(a1 . x + b1, a2 . x + b2) with one call per layer, as in published detectors."""
    n, channels = x.shape[:2]
    pooled = F.adaptive_avg_pool2d(x, 1).view(n, channels)
    hidden = F.relu(F.linear(pooled, fc1_weight, fc1_bias))
    gate = F.relu6(F.linear(hidden, fc2_weight, fc2_bias) + 3) / 6
    a1, b1, a2, b2 = gate.view(n, 4 * channels, 1, 1).split(channels, dim=1)
    first = x * ((a1 - 0.5) * 2 + 1) + (b1 - 0.5)
    return torch.max(first, x * ((a2 - 0.5) * 2) + (b2 - 0.5))


def block_coefficients(
    moments: Sequence[tuple[Tensor, Tensor, Tensor]],
    norms: Sequence[nn.GroupNorm],
    gate: nn.Linear,
    relu: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of one level: scales of its branches, shift [N, C], coefficients of the ReLU [N, 4, C].

    Args:
        moments: of each branch the mean, the biased variance and the mean after upsampling,
            [N, C] each.
        norms: the normalisation of each branch.
        gate: the scale gate.
        relu: parameters of the dynamic ReLU.
    """
    scales, total = [], torch.zeros_like(moments[0][0])
    for (mean, var, up_mean), norm in zip(moments, norms, strict=True):
        grouped = mean.unflatten(1, (norm.num_groups, -1))
        centre = grouped.mean(2, keepdim=True)
        spread = var.unflatten(1, (norm.num_groups, -1)) + (grouped - centre).square()
        rstd = torch.rsqrt(spread.mean(2, keepdim=True) + norm.eps)
        factor = norm.weight * rstd.expand_as(grouped).flatten(1)
        shift = norm.bias - factor * centre.expand_as(grouped).flatten(1)
        share = F.relu6(F.relu(gate(factor * up_mean + shift)) + 3) / 6 / len(moments)
        scales.append(share * factor)
        total = total + share * shift
    pooled = total
    for scale, (_, _, up_mean) in zip(scales, moments, strict=True):
        pooled = pooled + scale * up_mean
    hidden = F.relu(F.linear(pooled, relu[0], relu[1]))
    t = 2 * F.relu6(F.linear(hidden, relu[2], relu[3]) + 3) / 6 - 1
    a1, b1, a2, b2 = t.chunk(4, dim=1)
    return scales, total, torch.stack([a1 + 1, b1 / 2, a2, b2 / 2], dim=1)


def fuse_branches(
    branches: Sequence[Sequence[Tensor]],
    scales: Sequence[Sequence[Tensor]],
    shifts: Sequence[Tensor],
    coefficients: Sequence[Tensor],
) -> list[Tensor]:
    """max(a1 . z + b1, a2 . z + b2) with z the sum of the scaled branches plus a shift, per level.

    Args:
        branches: per level, its own map [N, C, H, W] first; the others are upsampled to its size.
        scales: a [N, C] for each of them.
        shifts: [N, C] per level.
        coefficients: [N, 4, C] per level: a1, b1, a2, b2.
    """
    outputs = []
    for maps, factors, shift, level in zip(branches, scales, shifts, coefficients, strict=True):
        size = maps[0].shape[2:]
        z = shift[:, :, None, None]
        for y, factor in zip(maps, factors, strict=True):
            z = z + factor[:, :, None, None] * upsampled(y, size)
        a1, b1, a2, b2 = level[:, :, :, None, None].unbind(1)
        outputs.append(torch.max(a1 * z + b1, a2 * z + b2))
    return outputs


def spatial_attention(
    features: Tensor,
    weight: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor,
    targets: str,
    deform_conv: DeformConv,
) -> Tensor:
    """The paper's aggregation over levels, a deformable convolution for each target and level.

    Args:
        features: [N, L, C, H, W].
        weight: [L, C_out, C, 3, 3].
        offset_weight, offset_bias: of the 3x3 convolution that predicts offsets and mask.
        targets: "median" for one output, "all" for one of each level.
        deform_conv: the operator.
    """
    checks.one_of("targets", targets, checks.TARGETS)
    levels = features.shape[1]
    outputs = []
    for target in [median_level(levels)] if targets == "median" else range(levels):
        predictions = F.conv2d(features[:, target], offset_weight, offset_bias, padding=1)
        offset = predictions[:, :OFFSET_CHANNELS].contiguous()
        mask = predictions[:, OFFSET_CHANNELS:].sigmoid()
        maps = [
            deform_conv(features[:, level].contiguous(), offset, mask, weight[level], None, 1)
            for level in range(levels)
        ]
        outputs.append(torch.stack(maps).mean(0))
    return torch.stack(outputs, dim=1)


def unified_block(
    features: Tensor, parameters: UnifiedParameters, deform_conv: DeformConv
) -> Tensor:
    """One block of the paper's form; see :func:`dyhead_cuda.reference.unified_block`."""
    p = parameters
    features = scale_attention(features, p.scale_weight, p.scale_bias)
    features = spatial_attention(
        features, p.spatial_weight, p.offset_weight, p.offset_bias, "all", deform_conv
    )
    pooled = features.mean((1, 3, 4))
    hidden = F.relu(F.linear(pooled, p.fc1_weight, p.fc1_bias))
    t = 2 * F.linear(hidden, p.fc2_weight, p.fc2_bias).sigmoid() - 1
    a1, b1, a2, b2 = t[:, None, :, None, None].chunk(4, dim=2)
    return torch.max(features * (a1 + 1) + b1 / 2, features * a2 + b2 / 2)

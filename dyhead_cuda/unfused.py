"""The head module by module: the deformable convolution is compiled, all else is called.

A block runs like this where one of its inner modules is not plain (:mod:`dyhead_cuda.plain`): hooks
fire, adapters act, and weights that are computed at each call are the current ones. The numbers are
those of the fused block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import checks, functional
from dyhead_cuda.numerics import (
    Activation,
    Targets,
    finer_for_low,
    high_offset_and_mask,
    hsigmoid,
    no_autocast,
    resize,
    target_levels,
)
from dyhead_cuda.pyramid import HIGH_OFFSETS, OFFSET_CHANNELS, TAPS, UPSAMPLES, HighOffset, Upsample


class Branch(Protocol):
    """A deformable convolution and its normalisation."""

    def __call__(self, x: Tensor, offset: Tensor, mask: Tensor, stride: int) -> Tensor:
        """[N, C_out, H_out, W_out] of x [N, C_in, H, W], offset [N, 18, H_out, W_out], mask."""


class BlockParts(NamedTuple):
    """The parts of a published block, each called once for every map that it reads.

    Args:
        offset_conv: x [N, C_in, H, W] to [N, 27, H, W]: 18 offsets, then 9 mask logits; None is
            offsets of zero and a modulation of one.
        low, mid, high: see :class:`Branch`; ``low`` is called with stride 2.
        gate: a normalised branch [N, C_out, H, W] to its gate, which broadcasts to it.
        task: the gated average [N, C_out, H, W] to the result, of the same shape.
    """

    offset_conv: Callable[[Tensor], Tensor] | None
    low: Branch
    mid: Branch
    high: Branch
    gate: Callable[[Tensor], Tensor]
    task: Callable[[Tensor], Tensor]


def offset_and_mask(
    offset_conv: Callable[[Tensor], Tensor] | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Offsets [N, 18, H, W] and modulation [N, 9, H, W] (after its sigmoid) predicted from x."""
    if offset_conv is None:
        images, _, height, width = x.shape
        offset = x.new_zeros(images, OFFSET_CHANNELS, height, width)
        return offset, x.new_ones(images, TAPS, height, width)
    if x.numel() == 0:
        predictions = x.new_zeros(x.shape[0], OFFSET_CHANNELS + TAPS, *x.shape[2:])
    else:
        predictions = offset_conv(x)
    return predictions[:, :OFFSET_CHANNELS], predictions[:, OFFSET_CHANNELS:].sigmoid()


def pyramid_block(
    features: Sequence[Tensor],
    parts: BlockParts,
    *,
    high_offset: HighOffset,
    upsample: Upsample,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """One published block; see :func:`dyhead_cuda.reference.pyramid_block` for the formulas.

    Args:
        features: levels [N, C_in, H_l, W_l], finest first, of one type, checked by the caller.
        parts: what is called.
        high_offset, upsample: as for :func:`dyhead_cuda.functional.pyramid_block`.
        dtype: the type that the parts take (that of their parameters); None: as the features.

    Returns:
        list of [N, C_out, H_l, W_l] in the dtype of the features.

    Raises:
        ValueError: an unknown ``high_offset`` or ``upsample``.
    """
    checks.one_of("high_offset", high_offset, HIGH_OFFSETS)
    checks.one_of("upsample", upsample, UPSAMPLES)
    levels = [x.to(dtype or x.dtype).contiguous() for x in features]
    outputs = []
    with no_autocast(features[0]):
        for level, x in enumerate(levels):
            size = (x.shape[-2], x.shape[-1])
            offset, mask = offset_and_mask(parts.offset_conv, x)
            branches = [parts.mid(x, offset, mask, 1)]
            if level > 0:
                branches.append(parts.low(finer_for_low(levels[level - 1], size), offset, mask, 2))
            if level + 1 < len(levels):
                coarser = levels[level + 1]
                if high_offset == "aligned":
                    y = parts.high(resize(coarser, size, upsample), offset, mask, 1)
                else:
                    coarse_size = (coarser.shape[-2], coarser.shape[-1])
                    read = high_offset_and_mask(offset, mask, coarse_size, high_offset)
                    y = resize(parts.high(coarser, *read, 1), size, upsample)
                branches.append(y)
            gated = torch.stack([parts.gate(y) * y for y in branches])
            outputs.append(parts.task(gated.mean(0)).to(features[0].dtype))
    return outputs


def dynamic_relu(
    x: Tensor,
    fc1: Callable[[Tensor], Tensor],
    fc2: Callable[[Tensor], Tensor],
    activation: Activation,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The dynamic ReLU with layers that are called; see :func:`dyhead_cuda.reference.dynamic_relu`.

    Args:
        x: [N, C, ...].
        fc1, fc2: [N, C] to [N, C // r], and that to [N, 4 * C].
        activation: "hsigmoid" or "sigmoid".
        dtype: the type that the layers take; None: as ``x``.

    Returns:
        As ``x``.

    Raises:
        ValueError: an unknown activation.
    """
    checks.one_of("activation", activation, checks.ACTIVATIONS)
    positions = tuple(range(2, x.dim()))
    if 0 in x.shape[2:]:
        return x.clone()
    value = x.to(dtype or x.dtype)
    with no_autocast(x):
        logits = fc2(F.relu(fc1(value.mean(positions) if positions else value)))
    gate = hsigmoid(logits) if activation == "hsigmoid" else logits.sigmoid()
    lines = 2 * gate - 1
    for _ in positions:
        lines = lines.unsqueeze(-1)
    a1, b1, a2, b2 = lines.chunk(4, dim=1)
    return torch.maximum(value * (a1 + 1) + b1 / 2, value * a2 + b2 / 2).to(x.dtype)


def unified_block(
    features: Tensor,
    scale: Callable[[Tensor], Tensor],
    offset_conv: Callable[[Tensor], Tensor],
    spatial_weight: Tensor,
    task: Callable[[Tensor], Tensor],
    targets: Targets,
) -> Tensor:
    """One block of the paper's form; see :func:`dyhead_cuda.reference.unified_block`.

    Args:
        features: F, [N, L, C, H, W].
        scale: the level means [N, L] to [N, L].
        offset_conv: [N, C, H, W] to [N, 27, H, W].
        spatial_weight: [L, C_out, C, 3, 3].
        task: the dynamic ReLU of [N, C_out, L, H, W], to the same shape.
        targets: "all" or "median".

    Returns:
        [N, L, C_out, H, W], or [N, 1, C_out, H, W] for "median", in the dtype of the features.

    Raises:
        ValueError: unknown targets.
    """
    levels = features.shape[1]
    f = features.to(spatial_weight.dtype)
    with no_autocast(features):
        gates = ((scale(f.flatten(2).mean(2)) + 1) / 2).clamp(0, 1)
        gated = f * gates.view(*gates.shape, 1, 1, 1)
        # A target's offsets are the same for all levels: one convolution of their channels.
        stacked, weight = gated.flatten(1, 2), spatial_weight.transpose(0, 1).flatten(1, 2)
        outputs = []
        for target in target_levels(targets, levels):
            offset, mask = offset_and_mask(offset_conv, gated[:, target])
            y = functional.modulated_deform_conv2d(stacked, offset, weight, None, 1, 1, 1, mask)
            outputs.append(y / levels)
        return task(torch.stack(outputs, dim=2)).transpose(1, 2).to(features.dtype)

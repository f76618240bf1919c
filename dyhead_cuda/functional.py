"""The public operators: each checks its arguments, then runs on the backend in force.

On the backend "reference" each is the function of the same name in :mod:`dyhead_cuda.reference`. On
the others it runs compiled kernels on rows of channels: a pyramid is packed once into one matrix of
rows. Results have memory of their own and the memory format of the inputs, as convolutions do. The
backward of the compiled kernels is not differentiable again: use the reference for second
derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import checks, fused, onnx, reference
from dyhead_cuda.backends import select
from dyhead_cuda.numerics import (
    Activation,
    ResizeMode,
    Targets,
    UnifiedParameters,
    output_format,
)
from dyhead_cuda.ops.dynamic_relu import dynamic_relu as fused_dynamic_relu
from dyhead_cuda.pyramid import UPSAMPLES, BlockParameters, HighOffset, Upsample
from dyhead_cuda.recompute import recomputed

__all__ = [
    "dynamic_relu",
    "modulated_deform_conv2d",
    "pyramid_block",
    "pyramid_blocks",
    "scale_attention",
    "scale_gates",
    "spatial_attention",
    "stack_pyramid",
    "task_attention",
    "unified_block",
]


def _like(out: Tensor, x: Tensor) -> Tensor:
    """``out``, contiguous where ``x`` is."""
    return out.contiguous() if x.is_contiguous() else out


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Modulated deformable convolution (DCNv2), as ``torchvision.ops.deform_conv2d``.

    out(p) = sum_k w_k . input(p * stride - padding + k * dilation + offset_k(p)) * mask_k(p).

    Args:
        input: [N, C_in, H, W], of float64, float32, float16 or bfloat16.
        offset: [N, 2 * D * K, H_out, W_out] in pixels of the input, dy before dx for each of the K
            taps of each of the D deformable groups. Of any floating type, as all that follow.
        weight: [C_out, C_in / groups, kh, kw]; the number of groups follows from its shape.
        bias: [C_out] or None.
        stride: an int or (vertical, horizontal), in pixels.
        padding: likewise.
        dilation: likewise.
        mask: [N, D * K, H_out, W_out], the modulation (after its sigmoid), or None for ones.

    Returns:
        [N, C_out, H_out, W_out] in the dtype and memory format of the input. Samples at or beyond
        coordinate -1 or the far border are zero and have zero offset gradient; samples at NaN or
        infinity are NaN. So is a sample outside whose mask is not finite.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, devices or types that do not fit, with what was expected.

    Source: arXiv 1811.11168, equation 1.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 8, 10, 12), torch.randn(16, 8, 3, 3)
        >>> offset, mask = torch.randn(2, 18, 10, 12), torch.rand(2, 9, 10, 12)
        >>> modulated_deform_conv2d(x, offset, weight, padding=1, mask=mask).shape
        torch.Size([2, 16, 10, 12])
    """
    geometry = checks.deform_conv_geometry(
        input, offset, weight, bias, stride, padding, dilation, mask
    )
    chosen = select(input)
    if chosen == "onnx":
        return onnx.modulated_deform_conv2d(input, offset, weight, bias, mask, geometry)
    if chosen == "reference":
        out = reference.modulated_deform_conv2d(
            input, offset, weight, bias, stride, padding, dilation, mask
        )
        return out.contiguous(memory_format=output_format([input], torch.preserve_format))
    return fused.modulated_deform_conv2d(input, offset, weight, bias, mask, geometry)


def dynamic_relu(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: Activation = "hsigmoid",
) -> Tensor:
    """Task-aware attention: max(a1 . x + b1, a2 . x + b2) per channel (dynamic ReLU).

    t = 2 . s(fc2(relu(fc1(mean(x))))) - 1 in [-1, 1], split in the order a1, b1, a2, b2 of C values
    each; a1 = 1 + t, a2 = t, b1 and b2 = t / 2. The mean is over all positions of an image.

    Args:
        x: [N, C, ...] of any floating type; any number of trailing dimensions, none included.
        fc1_weight: [C // r, C], of any floating type, as all that follow.
        fc1_bias: [C // r].
        fc2_weight: [4 * C, C // r].
        fc2_bias: [4 * C].
        activation: s, "hsigmoid" (relu6(x + 3) / 6: the published code) or "sigmoid" (logistic: the
            paper).

    Returns:
        As ``x``: its shape, dtype and, where it is contiguous, its memory format.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, devices or types that do not fit, an unknown activation.

    Source: arXiv 2003.10027 as used in arXiv 2106.08322, section 3.2.

    Example:
        >>> import torch
        >>> layers = torch.randn(2, 8), torch.zeros(2), torch.randn(32, 2), torch.zeros(32)
        >>> dynamic_relu(torch.randn(1, 8, 5, 5), *layers).shape
        torch.Size([1, 8, 5, 5])
    """
    checks.dynamic_relu(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    chosen = select(x)
    if chosen == "onnx":
        layers = fc1_weight, fc1_bias, fc2_weight, fc2_bias
        return onnx.dynamic_relu(x, *layers, activation=activation)
    if chosen == "reference" or x.numel() == 0:
        return reference.dynamic_relu(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation
        )
    rows = x.flatten(2).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)  # [N, P, C]
    out = fused_dynamic_relu(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    out = out.transpose(1, 2).reshape(x.shape) if x.dim() > 2 else out.squeeze(1)
    return _like(out, x)


def stack_pyramid(
    features: Sequence[Tensor], mode: ResizeMode = "bilinear", size: Sequence[int] | None = None
) -> Tensor:
    """Resize a pyramid to its median level and stack it: plain PyTorch on every backend.

    Args:
        features: L levels [N, C, H_l, W_l] of one floating type, finest first.
        mode: "bilinear" (align_corners=False), "nearest", or "max" (adaptive max pooling where a
            level shrinks, nearest where it grows).
        size: (H, W) in pixels to resize to instead of the median level's.

    Returns:
        [N, L, C, H, W] in the dtype of the features.

    Raises:
        TypeError: no list or tuple of tensors.
        ValueError: no level, an unknown mode, a size that is none, or levels that differ in batch,
            channels, type or device.

    Source: arXiv 2106.08322, section 3.1.

    Example:
        >>> import torch
        >>> stack_pyramid([torch.randn(1, 8, side, side) for side in (16, 8, 4)]).shape
        torch.Size([1, 3, 8, 8, 8])
    """
    checks.stackable(features, mode, size)
    if select(features[0]) == "onnx":
        return onnx.stack_pyramid(features, mode, size)
    return reference.stack_pyramid(features, mode, size)


def scale_gates(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gates of the scale attention pi_L: plain PyTorch on every backend.

    gate_l = max(0, min(1, (f(mean_{S,C} F)_l + 1) / 2)), with f a linear map over the level means.

    Args:
        features: F, [N, L, C, H, W] of any floating type.
        weight: [L, L], of f, of any floating type.
        bias: [L].

    Returns:
        [N, L], float64 for float64 features and float32 for all others.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, devices or types that do not fit.

    Source: arXiv 2106.08322, equation 3.

    Example:
        >>> import torch
        >>> scale_gates(torch.zeros(1, 3, 8, 4, 4), torch.eye(3), torch.zeros(3))
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    return reference.scale_gates(features, weight, bias)


def scale_attention(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """pi_L(F) . F, every level times its gate: plain PyTorch on every backend.

    Args:
        features: F, [N, L, C, H, W] of any floating type.
        weight: [L, L], see :func:`scale_gates`.
        bias: [L].

    Returns:
        As ``features``.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, devices or types that do not fit.

    Source: arXiv 2106.08322, equation 3.

    Example:
        >>> import torch
        >>> f = torch.ones(1, 3, 8, 4, 4)
        >>> scale_attention(f, torch.zeros(3, 3), torch.zeros(3)).unique()
        tensor([0.5000])
    """
    return reference.scale_attention(features, weight, bias)


def spatial_attention(
    features: Tensor,
    weight: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor,
    *,
    targets: Targets = "all",
    gates: Tensor | None = None,
) -> Tensor:
    """pi_S(F) . F: deformable aggregation, averaged over the levels.

    out(t; p) = 1 / L sum_l sum_k w_{l,k} . F(l; p_k + dp_k) * dm_k, with the offsets dp and the
    modulation dm (a sigmoid) predicted from level t by one 3x3 convolution. The compiled form folds
    the gates into the sampling and the sum over levels and taps into one product: nothing of the
    size of L times the features is made.

    Args:
        features: F, [N, L, C, H, W] of any floating type.
        weight: w, [L, C_out, C, 3, 3], of any floating type, as all that follow.
        offset_weight: [27, C, 3, 3]: 18 offsets (dy, dx per tap, in pixels), then 9 mask logits.
        offset_bias: [27].
        targets: "median" is the formula as printed, t = the median level only; "all" takes the sum
            for every level t with offsets of its own, so that blocks can be stacked.
        gates: [N, L] or None: use gate_l . F(l) in place of F(l), the product that the paper's
            pi_S gets from pi_L (see :func:`scale_gates`).

    Returns:
        [N, 1, C_out, H, W] for "median", [N, L, C_out, H, W] for "all", in the dtype of the
        features; contiguous where they are.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, devices or types that do not fit, unknown targets.

    Source: arXiv 2106.08322, equation 4.

    Example:
        >>> import torch
        >>> f, weight = torch.randn(1, 3, 8, 6, 7), torch.randn(3, 8, 8, 3, 3)
        >>> spatial_attention(f, weight, torch.zeros(27, 8, 3, 3), torch.zeros(27)).shape
        torch.Size([1, 3, 8, 6, 7])
    """
    out = _spatial(features, weight, offset_weight, offset_bias, targets, gates)
    return _like(out, features)


def _spatial(
    features: Tensor,
    weight: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor,
    targets: Targets,
    gates: Tensor | None,
) -> Tensor:
    """:func:`spatial_attention` in whatever memory format it comes."""
    checks.spatial_attention(features, weight, offset_weight, offset_bias, targets, gates)
    chosen = select(features)
    if chosen == "onnx":
        return onnx.spatial_attention(features, weight, offset_weight, offset_bias, targets, gates)
    if chosen == "reference":
        return reference.spatial_attention(
            features, weight, offset_weight, offset_bias, targets=targets, gates=gates
        )
    return fused.spatial_attention(features, weight, offset_weight, offset_bias, targets, gates)


def task_attention(
    features: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: Activation = "sigmoid",
) -> Tensor:
    """pi_C(F) . F: the dynamic ReLU with the average over levels and space.

    Args:
        features: F, [N, L, C, H, W] of any floating type.
        fc1_weight: [C // r, C], see :func:`dynamic_relu`.
        fc1_bias: [C // r].
        fc2_weight: [4 * C, C // r].
        fc2_bias: [4 * C].
        activation: "sigmoid" (the paper's shifted sigmoid is the logistic one) or "hsigmoid".

    Returns:
        As ``features``.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes, devices or types that do not fit, an unknown activation.

    Source: arXiv 2106.08322, equation 5.

    Example:
        >>> import torch
        >>> layers = torch.randn(2, 8), torch.zeros(2), torch.randn(32, 2), torch.zeros(32)
        >>> task_attention(torch.randn(1, 3, 8, 4, 4), *layers).shape
        torch.Size([1, 3, 8, 4, 4])
    """
    checks.unified_features(features)
    if select(features) == "onnx":
        by_channel = features.transpose(1, 2)
        layers = fc1_weight, fc1_bias, fc2_weight, fc2_bias
        checks.dynamic_relu(by_channel, *layers, activation)
        return onnx.task_attention(features, *layers, activation=activation)
    by_channel = features.transpose(1, 2)
    out = dynamic_relu(
        by_channel, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation
    )
    return _like(out.transpose(1, 2), features)


def pyramid_block(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    *,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
    num_groups: int = 16,
    eps: float = 1e-5,
    memory_format: torch.memory_format = torch.preserve_format,
) -> list[Tensor]:
    """One block of the published head on a pyramid, finest level first.

    Per level: offsets and modulation from a 3x3 convolution; up to three deformable branches (the
    level, the finer one with stride 2, the coarser one upsampled), each with group normalisation
    and a scale-aware gate; their average; dynamic ReLU.

    Args:
        features: levels [N, C_in, H_l, W_l] of one floating type; each level is half of the finer
            one, rounded up, unless ``high_offset`` is "aligned".
        parameters: see :class:`~dyhead_cuda.BlockParameters`; of any floating type.
        high_offset: how the ``high`` branch on level l + 1 gets the offsets and mask predicted at
            level l: "flat" (every released checkpoint), "crop", "mmdet_main" or "aligned"; see
            :func:`dyhead_cuda.reference.pyramid_block`.
        upsample: how that branch comes to level l's size, "bilinear" (published) or "nearest".
        num_groups: of the group normalisation.
        eps: of the group normalisation.
        memory_format: of the results, torch.contiguous_format or torch.channels_last;
            torch.preserve_format is that of the features.

    Returns:
        list of [N, C_out, H_l, W_l] in the dtype of the features, each with memory of its own.

    Raises:
        TypeError: features that are no list or tuple of tensors, or no ``BlockParameters``.
        ValueError: a pyramid or parameters that do not fit, with what was expected.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``; mmdet, ``necks/dyhead.py``.

    Example:
        >>> import torch, dyhead_cuda
        >>> parameters = dyhead_cuda.DyHeadBlock(8, 16).parameters_tuple()
        >>> levels = [torch.randn(1, 8, side, side) for side in (16, 8, 4)]
        >>> [tuple(x.shape) for x in pyramid_block(levels, parameters)]
        [(1, 16, 16, 16), (1, 16, 8, 8), (1, 16, 4, 4)]
    """
    return pyramid_blocks(
        features,
        [parameters],
        high_offset=high_offset,
        upsample=upsample,
        num_groups=num_groups,
        eps=eps,
        memory_format=memory_format,
    )


def pyramid_blocks(
    features: Sequence[Tensor],
    blocks: Sequence[BlockParameters],
    *,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
    num_groups: int = 16,
    eps: float = 1e-5,
    recompute: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> list[Tensor]:
    """Blocks of the published head in turn, each on the result of the one before.

    The compiled kernels pack the levels into rows once and hand the rows from block to block.

    Args:
        features: levels [N, C_in, H_l, W_l], as for :func:`pyramid_block`.
        blocks: the parameters of each block, at least one.
        high_offset: of all blocks, as for :func:`pyramid_block`.
        upsample: likewise.
        num_groups: likewise.
        eps: likewise.
        recompute: keep for the backward only what goes into each block, and compute the rest again
            there; see :class:`~dyhead_cuda.DyHead`.
        memory_format: of the results, as for :func:`pyramid_block`.

    Returns:
        list of [N, C_out, H_l, W_l] in the dtype of the features, each with memory of its own.

    Raises:
        TypeError: features that are no list or tuple of tensors, blocks that are no list or
            tuple of ``BlockParameters``, or a ``recompute`` that is no bool.
        ValueError: no block, a pyramid or parameters that do not fit, with what was expected.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``.

    Example:
        >>> import torch, dyhead_cuda
        >>> blocks = [block.parameters_tuple() for block in dyhead_cuda.DyHead(16, 16, 2).blocks]
        >>> levels = [torch.randn(1, 16, side, side) for side in (8, 4)]
        >>> [tuple(x.shape) for x in pyramid_blocks(levels, blocks)]
        [(1, 16, 8, 8), (1, 16, 4, 4)]
    """
    checks.levels(features)
    if not isinstance(blocks, (list, tuple)) or isinstance(blocks, BlockParameters):
        raise TypeError(
            "expected blocks as a list or tuple of dyhead_cuda.BlockParameters, got "
            f"{type(blocks).__name__}"
        )
    if len(blocks) == 0:
        raise ValueError("expected the parameters of at least one block, got none")
    in_channels = None
    for parameters in blocks:
        needed, out_channels = checks.block_parameters(parameters, num_groups, features)
        if in_channels is None:
            checks.pyramid(features, needed, high_offset)
        elif needed != in_channels:
            raise ValueError(
                f"expected a block with {in_channels} input channels (the output channels of the "
                f"block before), got {needed}"
            )
        in_channels = out_channels
    checks.one_of("upsample", upsample, UPSAMPLES)
    checks.epsilon(eps)
    checks.switch(recompute=recompute)
    memory_format = output_format(features, memory_format)
    options: dict[str, Any] = {
        "high_offset": high_offset,
        "upsample": upsample,
        "num_groups": num_groups,
        "eps": eps,
    }
    chosen = select(features[0])
    if chosen == "onnx":
        return onnx.pyramid_blocks(features, blocks, **options)
    if chosen != "reference":
        return fused.pyramid_blocks(
            features, blocks, **options, recompute=recompute, memory_format=memory_format
        )
    run = partial(
        _reference_block, high_offset=high_offset, upsample=upsample, num_groups=num_groups, eps=eps
    )
    levels = list(features)
    for parameters in blocks:
        levels = recomputed(run, levels, parameters) if recompute else run(levels, parameters)
    return [x.contiguous(memory_format=memory_format) for x in levels]


def _reference_block(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    *,
    high_offset: HighOffset,
    upsample: Upsample,
    num_groups: int,
    eps: float,
) -> list[Tensor]:
    """A block on the reference, but for a compiled dynamic ReLU where there is one."""
    combined = reference.combine_branches(
        features,
        parameters,
        high_offset=high_offset,
        upsample=upsample,
        num_groups=num_groups,
        eps=eps,
    )
    return [dynamic_relu(x, *parameters.task()).to(features[0].dtype) for x in combined]


def unified_block(
    features: Tensor, parameters: UnifiedParameters, targets: Targets = "all"
) -> Tensor:
    """W(F) = pi_C(pi_S(pi_L(F) . F) . F) . F, one block of the paper's form.

    Args:
        features: F, [N, L, C, H, W] of any floating type.
        parameters: see :class:`~dyhead_cuda.reference.UnifiedParameters`; of any floating type.
        targets: as for :func:`spatial_attention`; only "all" can be stacked.

    Returns:
        [N, L, C_out, H, W], or [N, 1, C_out, H, W] for targets "median", in the dtype of the
        features; contiguous where they are.

    Raises:
        TypeError: what should be a tensor is none, or no ``UnifiedParameters``.
        ValueError: shapes, devices or types that do not fit, unknown targets.

    Source: arXiv 2106.08322, equation 2.

    Example:
        >>> import torch, dyhead_cuda
        >>> block = dyhead_cuda.UnifiedDyHead(levels=3, channels=8, num_blocks=1).blocks[0]
        >>> unified_block(torch.randn(1, 3, 8, 6, 7), block.parameters_tuple()).shape
        torch.Size([1, 3, 8, 6, 7])
    """
    checks.unified_parameters(parameters, UnifiedParameters)
    p = parameters
    gates = scale_gates(features, p.scale_weight, p.scale_bias)
    out = _spatial(features, p.spatial_weight, p.offset_weight, p.offset_bias, targets, gates)
    return _like(task_attention(out, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias), features)

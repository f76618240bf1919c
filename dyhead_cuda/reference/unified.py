"""The paper's form: one tensor F of [N, L, C, H, W] and three attentions applied to it in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import checks
from dyhead_cuda.numerics import (
    Activation,
    ResizeMode,
    Targets,
    UnifiedParameters,
    median_level,
    no_autocast,
    target_levels,
    to_compute,
)
from dyhead_cuda.reference.operators import dynamic_relu, modulated_deform_conv2d, offset_and_mask


def stack_pyramid(
    features: Sequence[Tensor], mode: ResizeMode = "bilinear", size: Sequence[int] | None = None
) -> Tensor:
    """Resize a pyramid to its median level and stack it as [N, L, C, H, W].

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

    Source: the paper, section 3.1.

    Example:
        >>> import torch
        >>> stack_pyramid([torch.randn(1, 8, side, side) for side in (16, 8, 4)]).shape
        torch.Size([1, 3, 8, 8, 8])
    """
    checks.stackable(features, mode, size)
    if size is None:
        size = features[median_level(len(features))].shape[-2:]
    height, width = size

    def resize(x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) == (height, width):
            return x
        if x.numel() == 0 or height * width == 0:
            return x.new_zeros(*x.shape[:2], height, width)
        if mode == "bilinear":
            return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        if mode == "max" and x.shape[-2] >= height and x.shape[-1] >= width:
            return F.adaptive_max_pool2d(x, (height, width))
        return F.interpolate(x, (height, width), mode="nearest")

    with no_autocast(features[0]):  # on CPUs autocast refuses to stack the other half type
        return torch.stack([resize(x) for x in features], dim=1)


def scale_gates(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gates of the scale attention pi_L: gate_l = max(0, min(1, (f(mean_{S,C} F)_l + 1) / 2)).

    Args:
        features: F, [N, L, C, H, W] of any floating type.
        weight: [L, L], of the linear map f over the level means; of any floating type.
        bias: [L], likewise.

    Returns:
        [N, L], float64 for float64 features and float32 for all others.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes that do not fit.

    Source: the paper, equation 3.

    Example:
        >>> import torch
        >>> scale_gates(torch.zeros(1, 3, 8, 4, 4), torch.eye(3), torch.zeros(3))
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    checks.scale_attention(features, weight, bias)
    means = to_compute(features).flatten(2).mean(2)
    with no_autocast(means):
        return ((F.linear(means, weight.to(means), bias.to(means)) + 1) / 2).clamp(0, 1)


def scale_attention(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """pi_L(F) . F: every level times its gate.

    Args:
        features: F, [N, L, C, H, W] of any floating type.
        weight: [L, L], see :func:`scale_gates`.
        bias: [L], likewise.

    Returns:
        As ``features``.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes that do not fit.

    Source: the paper, equation 3.

    Example:
        >>> import torch
        >>> f = torch.ones(1, 3, 8, 4, 4)
        >>> scale_attention(f, torch.zeros(3, 3), torch.zeros(3)).unique()
        tensor([0.5000])
    """
    gates = scale_gates(features, weight, bias)
    gated = to_compute(features) * gates.view(*gates.shape, 1, 1, 1)
    return gated.to(features.dtype)


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
    modulation dm (a sigmoid) predicted from level t by one 3x3 convolution.

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
        [N, 1, C_out, H, W] for "median", [N, L, C_out, H, W] for "all".

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes that do not fit, unknown targets.

    Source: the paper, equation 4.

    Example:
        >>> import torch
        >>> f, weight = torch.randn(1, 3, 8, 6, 7), torch.randn(3, 8, 8, 3, 3)
        >>> spatial_attention(f, weight, torch.zeros(27, 8, 3, 3), torch.zeros(27)).shape
        torch.Size([1, 3, 8, 6, 7])
    """
    checks.spatial_attention(features, weight, offset_weight, offset_bias, targets, gates)
    levels = features.shape[1]
    chosen = target_levels(targets, levels)
    dtype, features = features.dtype, to_compute(features)
    gate = features.new_ones(features.shape[:2]) if gates is None else gates.to(features.dtype)
    gate = gate.view(*gate.shape, 1, 1, 1)
    gated = features * gate
    outputs = []
    with no_autocast(features):
        for target in chosen:
            offset, mask = offset_and_mask(
                gated[:, target], offset_weight.to(features), offset_bias.to(features)
            )
            # A gate modulates its level, as the mask does, also where a sample is outside.
            aggregate = [
                modulated_deform_conv2d(
                    features[:, level], offset, weight[level], None, 1, 1, 1, mask * gate[:, level]
                )
                for level in range(levels)
            ]
            outputs.append(torch.stack(aggregate).sum(0) / levels)
    return torch.stack(outputs, dim=1).to(dtype)


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
        ValueError: shapes that do not fit, an unknown activation.

    Source: the paper, equation 5.

    Example:
        >>> import torch
        >>> layers = torch.randn(2, 8), torch.zeros(2), torch.randn(32, 2), torch.zeros(32)
        >>> task_attention(torch.randn(1, 3, 8, 4, 4), *layers).shape
        torch.Size([1, 3, 8, 4, 4])
    """
    checks.unified_features(features)
    by_channel = features.transpose(1, 2)
    out = dynamic_relu(
        by_channel, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation
    )
    return out.transpose(1, 2)


def unified_block(
    features: Tensor, parameters: UnifiedParameters, targets: Targets = "all"
) -> Tensor:
    """W(F) = pi_C(pi_S(pi_L(F) . F) . F) . F, one block of the paper's form.

    Args:
        features: F, [N, L, C, H, W] of any floating type.
        parameters: see :class:`UnifiedParameters`; of any floating type.
        targets: as for :func:`spatial_attention`; only "all" can be stacked.

    Returns:
        [N, L, C_out, H, W], or [N, 1, C_out, H, W] for targets "median".

    Raises:
        TypeError: what should be a tensor is none, or no :class:`UnifiedParameters`.
        ValueError: shapes that do not fit, unknown targets.

    Source: the paper, equation 2.

    Example:
        >>> import torch, dyhead_cuda
        >>> block = dyhead_cuda.UnifiedDyHead(levels=3, channels=8, num_blocks=1).blocks[0]
        >>> unified_block(torch.randn(1, 3, 8, 6, 7), block.parameters_tuple()).shape
        torch.Size([1, 3, 8, 6, 7])
    """
    checks.unified_parameters(parameters, UnifiedParameters)
    p = parameters
    gates = scale_gates(features, p.scale_weight, p.scale_bias)
    features = spatial_attention(
        features, p.spatial_weight, p.offset_weight, p.offset_bias, targets=targets, gates=gates
    )
    return task_attention(features, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias)

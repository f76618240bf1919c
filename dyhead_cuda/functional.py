"""The public operators: each checks its arguments, then runs on the backend in force.

Under the backend "reference" each is the function of the same name in
:mod:`dyhead_cuda.reference`, where the formulas, shapes and sources are given in full.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dyhead_cuda import checks, ops, reference
from dyhead_cuda.backends import select
from dyhead_cuda.pyramid import BlockParameters, HighOffset
from dyhead_cuda.reference import Activation, Targets, UnifiedParameters
from dyhead_cuda.reference import modulated_deform_conv2d as modulated_deform_conv2d
from dyhead_cuda.reference import scale_attention as scale_attention
from dyhead_cuda.reference import scale_gates as scale_gates
from dyhead_cuda.reference import spatial_attention as spatial_attention
from dyhead_cuda.reference import stack_pyramid as stack_pyramid

__all__ = [
    "dynamic_relu",
    "modulated_deform_conv2d",
    "pyramid_block",
    "scale_attention",
    "scale_gates",
    "spatial_attention",
    "stack_pyramid",
    "task_attention",
    "unified_block",
]


def dynamic_relu(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: Activation = "hsigmoid",
) -> Tensor:
    """Task-aware attention max(a1 . x + b1, a2 . x + b2) in one kernel.

    The arguments are those of :func:`dyhead_cuda.reference.dynamic_relu`. The compiled kernels work
    on rows of channels: a channels_last (or [N, C]) ``x`` is read in place, others are copied once;
    the result is channels_last. Their backward is not differentiable again: for double backward use
    the reference.
    """
    checks.dynamic_relu(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    if select(x) == "reference" or x.numel() == 0:
        return reference.dynamic_relu(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation
        )
    rows = x.flatten(2).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)  # [N, P, C]
    out = ops.dynamic_relu(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation)
    return out.transpose(1, 2).reshape(x.shape) if x.dim() > 2 else out.squeeze(1)


def task_attention(
    features: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: Activation = "sigmoid",
) -> Tensor:
    """Dynamic ReLU of [N, L, C, H, W] with the average over L x S.

    The arguments are those of :func:`dyhead_cuda.reference.task_attention`.
    """
    checks.unified_features(features)
    by_channel = features.transpose(1, 2)
    out = dynamic_relu(
        by_channel, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation
    )
    return out.transpose(1, 2)


def pyramid_block(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    *,
    high_offset: HighOffset = "flat",
    num_groups: int = 16,
    eps: float = 1e-5,
) -> list[Tensor]:
    """One block of the published head on a pyramid, finest level first.

    The arguments are those of :func:`dyhead_cuda.reference.pyramid_block`.
    """
    combined = reference.combine_branches(
        features, parameters, high_offset=high_offset, num_groups=num_groups, eps=eps
    )
    dtype = features[0].dtype
    return [dynamic_relu(x, *parameters.task).to(dtype) for x in combined]


def unified_block(
    features: Tensor, parameters: UnifiedParameters, targets: Targets = "all"
) -> Tensor:
    """W(F) = pi_C(pi_S(pi_L(F) . F) . F) . F, one block of the paper's form.

    The arguments are those of :func:`dyhead_cuda.reference.unified_block`.
    """
    p = parameters
    gates = scale_gates(features, p.scale_weight, p.scale_bias)
    features = spatial_attention(
        features, p.spatial_weight, p.offset_weight, p.offset_bias, targets=targets, gates=gates
    )
    return task_attention(features, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias)

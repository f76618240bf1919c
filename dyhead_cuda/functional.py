"""The public operators: each checks its arguments, then runs on the backend in force.

On the backend "reference" each is the function of the same name in :mod:`dyhead_cuda.reference`,
where arguments, formulas and sources are given in full. On the others it runs compiled kernels on
rows of channels: a pyramid is packed once into one matrix of rows, and results are channels_last.
The backward of the compiled kernels is not differentiable again: use the reference for second
derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dyhead_cuda import checks, fused, reference
from dyhead_cuda.backends import select
from dyhead_cuda.ops.dynamic_relu import dynamic_relu as fused_dynamic_relu
from dyhead_cuda.pyramid import UPSAMPLES, BlockParameters, HighOffset, Upsample
from dyhead_cuda.reference import Activation, Targets, UnifiedParameters
from dyhead_cuda.reference import scale_attention as scale_attention
from dyhead_cuda.reference import scale_gates as scale_gates
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
    """DCNv2; see :func:`dyhead_cuda.reference.modulated_deform_conv2d`."""
    geometry = checks.deform_conv_geometry(
        input, offset, weight, bias, stride, padding, dilation, mask
    )
    if select(input) == "reference":
        return reference.modulated_deform_conv2d(
            input, offset, weight, bias, stride, padding, dilation, mask
        )
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
    """Task-aware attention in one kernel; see :func:`dyhead_cuda.reference.dynamic_relu`."""
    checks.dynamic_relu(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    if select(x) == "reference" or x.numel() == 0:
        return reference.dynamic_relu(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation
        )
    rows = x.flatten(2).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)  # [N, P, C]
    out = fused_dynamic_relu(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    return out.transpose(1, 2).reshape(x.shape) if x.dim() > 2 else out.squeeze(1)


def spatial_attention(
    features: Tensor,
    weight: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor,
    *,
    targets: Targets = "all",
    gates: Tensor | None = None,
) -> Tensor:
    """Deformable aggregation over levels; see :func:`dyhead_cuda.reference.spatial_attention`.

    The compiled form folds the gates into the sampling and the sum over levels and taps into one
    product: nothing of the size of L times the features is made.
    """
    checks.spatial_attention(features, weight, offset_weight, offset_bias, targets, gates)
    if select(features) == "reference":
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
    """Dynamic ReLU over levels and space; see :func:`dyhead_cuda.reference.task_attention`."""
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
    upsample: Upsample = "bilinear",
    num_groups: int = 16,
    eps: float = 1e-5,
) -> list[Tensor]:
    """One block of the published head; see :func:`dyhead_cuda.reference.pyramid_block`."""
    in_channels, _ = checks.block_parameters(parameters, num_groups, features)
    checks.pyramid(features, in_channels, high_offset)
    checks.one_of("upsample", upsample, UPSAMPLES)
    if select(features[0]) != "reference":
        return fused.pyramid_block(
            features,
            parameters,
            high_offset=high_offset,
            upsample=upsample,
            num_groups=num_groups,
            eps=eps,
        )
    combined = reference.combine_branches(
        features,
        parameters,
        high_offset=high_offset,
        upsample=upsample,
        num_groups=num_groups,
        eps=eps,
    )
    return [dynamic_relu(x, *parameters.task).to(features[0].dtype) for x in combined]


def unified_block(
    features: Tensor, parameters: UnifiedParameters, targets: Targets = "all"
) -> Tensor:
    """One block of the paper's form; see :func:`dyhead_cuda.reference.unified_block`."""
    p = parameters
    gates = scale_gates(features, p.scale_weight, p.scale_bias)
    features = spatial_attention(
        features, p.spatial_weight, p.offset_weight, p.offset_bias, targets=targets, gates=gates
    )
    return task_attention(features, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias)

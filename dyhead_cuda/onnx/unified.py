"""The paper's form: one tensor F of [N, L, C, H, W], as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda.numerics import (
    Activation,
    ResizeMode,
    Targets,
    median_level,
    target_levels,
    to_compute,
)
from dyhead_cuda.onnx import nodes
from dyhead_cuda.onnx.operators import dynamic_relu


def _windows(inputs: int, outputs: int, device: torch.device) -> Tensor:
    """The input positions of each window of an adaptive pooling, [outputs, longest window].

    Window i is from floor(i . inputs / outputs) to ceil((i + 1) . inputs / outputs); shorter ones
    have their last position several times, which changes no maximum.
    """
    i = torch.arange(outputs, device=device)
    first = i * inputs // outputs
    last = ((i + 1) * inputs + outputs - 1) // outputs - 1
    steps = torch.arange((inputs + outputs - 1) // outputs + 1, device=device)
    return torch.minimum(first.unsqueeze(1) + steps, last.unsqueeze(1))


def _adaptive_max(x: Tensor, size: Sequence[int]) -> Tensor:
    """F.adaptive_max_pool2d, which the exporter does not know: the maximum of rows, of columns."""
    for dim in (2, 3):
        positions = _windows(x.shape[dim], size[dim - 2], x.device)
        gathered = x.index_select(dim, positions.flatten())
        x = gathered.unflatten(dim, positions.shape).amax(dim + 1)
    return x


def stack_pyramid(
    features: Sequence[Tensor], mode: ResizeMode, size: Sequence[int] | None
) -> Tensor:
    """See :func:`dyhead_cuda.reference.stack_pyramid`."""
    median = features[median_level(len(features))]
    shape = median.shape[2:] if size is None else size
    target = nodes.size_of(median) if size is None else torch.tensor(size)

    def resize(x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) == tuple(shape):
            return x
        if mode == "max" and x.shape[2] >= shape[0] and x.shape[3] >= shape[1]:
            return _adaptive_max(x, shape)
        resizing = nodes.BILINEAR if mode == "bilinear" else nodes.NEAREST
        return nodes.resize(x, target, shape, resizing)

    return torch.stack([resize(x) for x in features], dim=1)


def spatial_attention(
    features: Tensor,
    weight: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor,
    targets: Targets,
    gates: Tensor | None,
) -> Tensor:
    """See :func:`dyhead_cuda.reference.spatial_attention`.

    A target's offsets are the same for all levels, so that the sum over levels is one deformable
    convolution of the channels of all of them.
    """
    n, levels, channels, height, width = features.shape
    value = to_compute(features)
    if gates is not None:
        value = value * gates.to(value.dtype).view(-1, levels, 1, 1, 1)
    constants, size = nodes.Constants(), nodes.size_of(value)
    target = torch.cat([constants(0, levels * channels), size])
    stacked = nodes.reshape(value, target, [n, levels * channels, height, width])
    of_levels = nodes.split(stacked, levels, 1)
    # [L, C_out, C, 3, 3] to [C_out, L * C, 3, 3]
    kernel = weight.to(value.dtype).transpose(0, 1).flatten(1, 2) / levels
    offset_weight, offset_bias = offset_weight.to(value.dtype), offset_bias.to(value.dtype)
    outs = []
    for level in target_levels(targets, levels):
        predictions = F.conv2d(of_levels[level], offset_weight, offset_bias, padding=1)
        offset, mask = nodes.offset_and_mask(predictions, constants)
        outs.append(nodes.deform_conv(stacked, kernel, offset, None, mask))
    out_channels = kernel.shape[0]
    target = torch.cat([constants(0, len(outs), out_channels), size])
    shape = [n, len(outs), out_channels, height, width]
    return nodes.reshape(torch.cat(outs, dim=1), target, shape).to(features.dtype)


def task_attention(
    features: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: Activation,
) -> Tensor:
    """See :func:`dyhead_cuda.reference.task_attention`."""
    layers = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    return dynamic_relu(features, *layers, activation=activation, channels_at=2)

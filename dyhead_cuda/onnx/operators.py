"""The operators that both forms of the head are made of, as ONNX nodes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import checks
from dyhead_cuda.numerics import Activation, to_compute
from dyhead_cuda.onnx import nodes


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: checks.DeformConvGeometry,
) -> Tensor:
    """See :func:`dyhead_cuda.reference.modulated_deform_conv2d`."""
    value = to_compute(input)
    dtype = value.dtype
    return nodes.deform_conv(
        value,
        weight.to(dtype),
        offset.to(dtype),
        None if bias is None else bias.to(dtype),
        None if mask is None else mask.to(dtype),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        deform_groups=geometry.deform_groups,
    ).to(input.dtype)


def coefficients(
    logits: Tensor, activation: Activation, channels_at: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From what the second layer of a dynamic ReLU gives to its two lines.

    Args:
        logits: [..., 4 * C, ...] with the channels at dimension ``channels_at``.
        activation: "hsigmoid" or "sigmoid".
        channels_at: see there.

    Returns:
        a1, b1, a2, b2, each [..., C, ...].
    """
    gate = F.hardsigmoid(logits) if activation == "hsigmoid" else logits.sigmoid()
    channels = logits.shape[channels_at] // 4
    shape = [1] * logits.dim()
    shape[channels_at] = 4 * channels

    def each(*values: float) -> Tensor:
        """A constant that has a value for each kind of coefficient."""
        long = [value for value in values for _ in range(channels)]
        return torch.tensor(long, dtype=gate.dtype, device=gate.device).view(shape)

    # With t = 2 gate - 1: a1 = 1 + t, b1 = t / 2, a2 = t, b2 = t / 2.
    all_of_them = gate * each(2, 1, 2, 1) + each(0, -0.5, -1, -0.5)
    a1, b1, a2, b2 = nodes.split(all_of_them, 4, channels_at)
    return a1, b1, a2, b2


def larger_line(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """max(a1 . x + b1, a2 . x + b2); the coefficients broadcast to x."""
    return torch.maximum(x * a1 + b1, x * a2 + b2)


def dynamic_relu(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: Activation,
    channels_at: int = 1,
) -> Tensor:
    """See :func:`dyhead_cuda.reference.dynamic_relu`; the channels may be another dimension."""
    value = to_compute(x)
    layers = [t.to(value.dtype) for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)]
    positions = [d for d in range(1, x.dim()) if d != channels_at]
    mean = value.mean(positions) if positions else value  # [N, C]
    hidden = F.relu(F.linear(mean, layers[0], layers[1]))
    logits = F.linear(hidden, layers[2], layers[3])
    if positions:
        shape = [1] * x.dim()
        shape[0], shape[channels_at] = -1, logits.shape[1]
        target = torch.tensor(shape)
        shape[0] = x.shape[0]
        logits = nodes.reshape(logits, target, shape)
    return larger_line(value, *coefficients(logits, activation, channels_at)).to(x.dtype)

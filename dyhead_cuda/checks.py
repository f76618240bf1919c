"""Every check of what users pass in, shared by all backends; each raises before anything is read.

A message says what was expected, what came, and how to fix it where that is not plain.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead_cuda.pyramid import (
    HIGH_OFFSETS,
    TAPS,
    BlockParameters,
    BranchParameters,
    halved,
)

ACTIVATIONS = ("hsigmoid", "sigmoid")
RESIZE_MODES = ("bilinear", "nearest", "max")
TARGETS = ("all", "median")
MEMORY_FORMATS = (torch.preserve_format, torch.contiguous_format, torch.channels_last)


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise unless ``value`` is one of the allowed names."""
    if value not in tuple(allowed):
        raise ValueError(f"expected {name} to be one of {tuple(allowed)}, got {value!r}")


def names(name: str, values: Collection[str], allowed: Sequence[str]) -> None:
    """Raise unless ``values`` is a collection of allowed names."""
    if isinstance(values, str) or not isinstance(values, Collection):
        raise ValueError(
            f"expected {name} as a list or tuple of names out of {tuple(allowed)}, got {values!r}"
        )
    for value in values:
        one_of(name, value, allowed)


def memory_format(value: torch.memory_format) -> None:
    """Raise unless ``value`` is a memory format that results can have."""
    if value not in MEMORY_FORMATS:
        raise ValueError(f"expected memory_format to be one of {MEMORY_FORMATS}, got {value!r}")


def positive(**sizes: int) -> None:
    """Raise unless every named size is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"expected {name} as an integer of at least 1, got {size!r}")


def _shape(name: str, tensor: Tensor | None, expected: Sequence[int | str], why: str = "") -> None:
    """Raise unless ``tensor`` has the expected shape; letters in it stand for any size."""
    if tensor is None:
        return
    fits = tensor.dim() == len(expected) and all(
        isinstance(e, str) or e == s for e, s in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join(map(str, expected)) + "]"
        raise ValueError(f"expected {name} {wanted}{why}, got {list(tensor.shape)}")


def _same_kind(first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"expected {name} on {first.device} (as the features), got {tensor.device}; "
                "move the module and its input to one device"
            )
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"expected a floating-point {name}, got {tensor.dtype}")


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"expected {name} as one or two integers >= {least}, got {value!r}")
    return pair[0], pair[1]


@dataclass(frozen=True)
class DeformConvGeometry:
    """Sizes that follow from the arguments of a modulated deformable convolution."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]
    groups: int
    deform_groups: int


def deform_conv_geometry(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Tensor | None,
) -> DeformConvGeometry:
    """Check the arguments of ``modulated_deform_conv2d`` and return its geometry."""
    _shape("input", input, ("N", "C_in", "H", "W"))
    _shape("weight", weight, ("C_out", "C_in / groups", "kh", "kw"))
    _same_kind(input, input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    strides = _pair("stride", stride, 1)
    paddings = _pair("padding", padding, 0)
    dilations = _pair("dilation", dilation, 1)
    n, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    if 0 in kernel:
        raise ValueError(f"expected a kernel of at least 1x1, got weight {list(weight.shape)}")
    if group_channels == 0 or channels % group_channels:
        raise ValueError(
            f"expected weight [C_out, C_in / groups, kh, kw] whose second size divides the input's "
            f"{channels} channels, got {list(weight.shape)}"
        )
    groups = channels // group_channels
    if groups == 0 or out_channels == 0 or out_channels % groups:
        raise ValueError(
            f"expected C_out divisible by the {groups} groups that follow from input "
            f"{list(input.shape)} and weight {list(weight.shape)}, got C_out {out_channels}"
        )
    out_h, out_w = (
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, p, d, k, st in zip(size, paddings, dilations, kernel, strides, strict=True)
    )
    if (out_h < 0 or out_w < 0) or ((out_h == 0 or out_w == 0) and 0 not in size):
        raise ValueError(
            f"expected an input at least as large as the dilated kernel, got input {size} with "
            f"kernel {kernel}, padding {paddings}, dilation {dilations}"
        )
    taps = kernel[0] * kernel[1]
    if offset.dim() != 4 or offset.shape[1] == 0 or offset.shape[1] % (2 * taps):
        raise ValueError(
            f"expected offset [N, 2 * deformable groups * {taps}, H_out, W_out], "
            f"got {list(offset.shape)}"
        )
    deform_groups = offset.shape[1] // (2 * taps)
    if channels % deform_groups:
        raise ValueError(
            f"expected the input's {channels} channels divisible by the {deform_groups} deformable "
            f"groups that follow from offset {list(offset.shape)}"
        )
    why = f" for input {list(input.shape)}, stride {strides}, padding {paddings}"
    _shape("offset", offset, (n, 2 * deform_groups * taps, out_h, out_w), why)
    _shape("mask", mask, (n, deform_groups * taps, out_h, out_w), why)
    _shape("bias", bias, (out_channels,))
    return DeformConvGeometry(
        (kernel[0], kernel[1]), strides, paddings, dilations, (out_h, out_w), groups, deform_groups
    )


def dynamic_relu(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str,
) -> None:
    """Check the arguments of ``dynamic_relu``."""
    one_of("activation", activation, ACTIVATIONS)
    if x.dim() < 2:
        raise ValueError(f"expected x [N, C, ...], got {list(x.shape)}")
    layers = {
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    _same_kind(x, x=x, **layers)
    channels = x.shape[1]
    _shape("fc1_weight", fc1_weight, ("C // r", channels), f" for x {list(x.shape)}")
    hidden = fc1_weight.shape[0]
    _shape("fc1_bias", fc1_bias, (hidden,))
    _shape("fc2_weight", fc2_weight, (4 * channels, hidden), f" for x {list(x.shape)}")
    _shape("fc2_bias", fc2_bias, (4 * channels,))


def pyramid(features: Sequence[Tensor], in_channels: int, high_offset: str) -> None:
    """Raise unless ``features`` is a pyramid that a block with ``in_channels`` inputs can read.

    Raises:
        ValueError: no level; a level that is not [N, in_channels, H, W]; levels of different batch,
            dtype or device; sizes that are not ceil(H / 2), ceil(W / 2) of the finer level (unless
            ``high_offset`` is "aligned", which takes any sizes).
    """
    one_of("high_offset", high_offset, HIGH_OFFSETS)
    if len(features) == 0:
        raise ValueError("expected at least one level of shape [N, C, H, W], got none")
    first = features[0]
    if not first.is_floating_point():
        raise ValueError(f"expected floating-point levels, got {first.dtype}")
    for level, x in enumerate(features):
        if x.dim() != 4 or x.shape[1] != in_channels:
            raise ValueError(
                f"expected level {level} of shape [N, {in_channels}, H, W], got {list(x.shape)}; "
                "in_channels of the head must equal the channels of the pyramid"
            )
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"expected batch {first.shape[0]} on every level (as on level 0), "
                f"got {x.shape[0]} on level {level}"
            )
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"expected {first.dtype} on {first.device} on every level (as on level 0), "
                f"got {x.dtype} on {x.device} on level {level}"
            )
    if high_offset == "aligned":
        return
    for level in range(1, len(features)):
        finer, size = features[level - 1].shape[-2:], features[level].shape[-2:]
        if tuple(size) != halved(finer):
            expected = "x".join(map(str, halved(finer)))
            raise ValueError(
                f"expected level {level} of size {expected} (half of level {level - 1}'s "
                f"{finer[0]}x{finer[1]}, rounded up), got {size[0]}x{size[1]}; pad the image to a "
                'multiple of the coarsest stride, or use high_offset="aligned", which takes any '
                "sizes"
            )


def block_parameters(
    parameters: BlockParameters, num_groups: int, features: Sequence[Tensor] = ()
) -> tuple[int, int]:
    """Return (in_channels, out_channels); raise ValueError upon parameters that do not fit."""
    weight = parameters.mid.weight
    out_channels, in_channels = weight.shape[:2]
    hidden = parameters.fc1_weight.shape[0]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "offset_weight": (parameters.offset_weight, (3 * TAPS, in_channels, 3, 3)),
        "offset_bias": (parameters.offset_bias, (3 * TAPS,)),
        "gate_weight": (parameters.gate_weight, (out_channels,)),
        "gate_bias": (parameters.gate_bias, (1,)),
        "fc1_weight": (parameters.fc1_weight, (hidden, out_channels)),
        "fc1_bias": (parameters.fc1_bias, (hidden,)),
        "fc2_weight": (parameters.fc2_weight, (4 * out_channels, hidden)),
        "fc2_bias": (parameters.fc2_bias, (4 * out_channels,)),
    }
    for name in ("low", "mid", "high"):
        branch: BranchParameters = getattr(parameters, name)
        expected[f"{name}.weight"] = (branch.weight, (out_channels, in_channels, 3, 3))
        for field in ("bias", "norm_weight", "norm_bias"):
            expected[f"{name}.{field}"] = (getattr(branch, field), (out_channels,))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"expected {name} of shape {list(shape)} (from mid.weight {list(weight.shape)}), "
                f"got {list(tensor.shape)}"
            )
    if len(features) > 0:
        _same_kind(features[0], **{name: tensor for name, (tensor, _) in expected.items()})
    if num_groups < 1 or out_channels % num_groups:
        raise ValueError(
            f"expected out_channels divisible by num_groups, got {out_channels} channels and "
            f"{num_groups} groups"
        )
    return in_channels, out_channels


def stackable(features: Sequence[Tensor], mode: str) -> None:
    """Check the arguments of ``stack_pyramid``."""
    one_of("mode", mode, RESIZE_MODES)
    if len(features) == 0:
        raise ValueError("expected at least one level of shape [N, C, H, W], got none")
    _shape("level 0", features[0], ("N", "C", "H", "W"))
    n, channels = features[0].shape[:2]
    for level, x in enumerate(features):
        _shape(f"level {level}", x, (n, channels, "H", "W"), " (as level 0)")


def unified_features(features: Tensor) -> None:
    """Raise unless ``features`` is one tensor of stacked levels."""
    _shape("features", features, ("N", "L", "C", "H", "W"))


def scale_attention(features: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check the arguments of ``scale_attention``."""
    unified_features(features)
    _same_kind(features, features=features, weight=weight, bias=bias)
    levels = features.shape[1]
    why = f" for {levels} levels"
    _shape("weight", weight, (levels, levels), why)
    _shape("bias", bias, (levels,), why)


def spatial_attention(
    features: Tensor,
    weight: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor,
    targets: str,
    gates: Tensor | None,
) -> None:
    """Check the arguments of ``spatial_attention``."""
    one_of("targets", targets, TARGETS)
    unified_features(features)
    _same_kind(
        features,
        features=features,
        weight=weight,
        offset_weight=offset_weight,
        offset_bias=offset_bias,
        gates=gates,
    )
    n, levels, channels, _, _ = features.shape
    why = f" for features {list(features.shape)}"
    _shape("weight", weight, (levels, "C_out", channels, 3, 3), why)
    _shape("offset_weight", offset_weight, (3 * TAPS, channels, 3, 3), why)
    _shape("offset_bias", offset_bias, (3 * TAPS,))
    _shape("gates", gates, (n, levels), why)

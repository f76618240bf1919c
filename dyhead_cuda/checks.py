"""Every check of what users pass in, shared by all backends; each raises before anything is read.

A message says what was expected, what came, and how to fix it where that is not plain.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
BRANCHES = ("low", "mid", "high")
BIASES = ("low.bias", "mid.bias", "high.bias")  # which a block may do without
MEMORY_FORMATS = (torch.preserve_format, torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_STEP = 1 << 20  # strides, paddings and dilations, as in csrc/host/deform_call.cpp
MAX_KERNEL = 1 << 10  # taps along one side, likewise


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise unless ``value`` is one of the allowed names."""
    if not isinstance(value, str) or value not in tuple(allowed):
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
    if not isinstance(value, torch.memory_format) or value not in MEMORY_FORMATS:
        raise ValueError(f"expected memory_format to be one of {MEMORY_FORMATS}, got {value!r}")


def switch(**values: bool) -> None:
    """Raise unless every named value is True or False (or 1 or 0)."""
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"expected {name} as True or False, got {value!r:.80}")


def _whole(value: Any) -> bool:
    """Whether ``value`` is an integer; True and False are none here."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def integers(**values: int) -> None:
    """Raise unless every named value is an integer."""
    for name, value in values.items():
        if not _whole(value):
            raise TypeError(f"expected {name} as an integer, got {value!r:.80}")


def positive(**sizes: int) -> None:
    """Raise unless every named size is an integer of at least 1."""
    for name, size in sizes.items():
        if not _whole(size) or size < 1:
            raise ValueError(f"expected {name} as an integer of at least 1, got {size!r}")


def epsilon(value: float) -> None:
    """Raise unless ``value`` can be the eps of a normalisation."""
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"expected eps as a number of at least 0, got {value!r}")


def instance(name: str, value: Any, kind: type, advice: str = "") -> None:
    """Raise unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(
            f"expected {name} as a {kind.__name__}, got {type(value).__name__}"
            f"{advice and '; '}{advice}"
        )


def tensor(name: str, value: Any) -> None:
    """Raise unless ``value`` is a dense tensor of a type that the operators compute in."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected {name} as a torch.Tensor, got {type(value).__name__}; "
            "torch.as_tensor makes one of an array or of numbers"
        )
    if value.dtype not in DTYPES:
        raise ValueError(
            f"expected a floating-point {name}, got {value.dtype}; convert it to one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
        raise ValueError(f"expected a dense {name}, got {kind}; call .to_dense() on it")


def levels(features: Any) -> None:
    """Raise unless ``features`` is a sequence of at least one tensor."""
    if type(features) not in (list, tuple) and (
        not isinstance(features, Sequence) or isinstance(features, (str, bytes))
    ):
        advice = "make a list of it"
        if isinstance(features, Tensor):
            advice = "wrap a single map in a list"
        elif isinstance(features, Mapping):
            advice = "pass list(features.values())"
        raise TypeError(
            f"expected a list or tuple of levels [N, C, H, W], got {type(features).__name__}; "
            f"{advice}"
        )
    if len(features) == 0:
        raise ValueError("expected at least one level of shape [N, C, H, W], got none")
    for index, level in enumerate(features):
        tensor(f"level {index}", level)


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


_STRIDED, _KINDS, _TENSORS = torch.strided, frozenset(DTYPES), (Tensor, torch.nn.Parameter)


def same_kind(first: Tensor, optional: Collection[str] = (), **others: Tensor | None) -> None:
    """Raise unless the others are tensors on the device of the first; ``optional``: or None."""
    for name, value in others.items():
        if value is None and name in optional:
            continue
        # Told fast, as a forward asks this of each parameter.
        known = value is not None and type(value) in _TENSORS
        plain = known and value.dtype in _KINDS and value.layout is _STRIDED  # type: ignore[union-attr]
        if value is None or not plain or value.is_nested:
            tensor(name, value)
            assert value is not None
        if value.device != first.device:
            raise ValueError(
                f"expected {name} on {first.device} (as the features), got {value.device}; "
                "move the module and its input to one device"
            )


def pair(
    name: str, value: int | Sequence[int], least: int, most: int = MAX_STEP
) -> tuple[int, int]:
    """One integer, or two for the vertical and the horizontal, as two; raise upon others."""
    both = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(both) != 2 or any(not _whole(v) or v < least for v in both):
        raise ValueError(f"expected {name} as one or two integers >= {least}, got {value!r}")
    if max(both) > most:
        raise ValueError(f"expected {name} of at most {most}, got {value!r}")
    return both[0], both[1]


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
    tensor("input", input)
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    same_kind(input, ("bias", "mask"), **tensors)
    _shape("input", input, ("N", "C_in", "H", "W"))
    _shape("weight", weight, ("C_out", "C_in / groups", "kh", "kw"))
    strides = pair("stride", stride, 1)
    paddings = pair("padding", padding, 0)
    dilations = pair("dilation", dilation, 1)
    n, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    if 0 in kernel or max(kernel) > MAX_KERNEL:
        raise ValueError(
            f"expected a kernel of 1x1 to {MAX_KERNEL}x{MAX_KERNEL}, got weight "
            f"{list(weight.shape)}"
        )
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


def relu_input(x: Tensor, channels: int | None = None) -> None:
    """Raise unless ``x`` is what a dynamic ReLU of ``channels`` (None: of any) takes."""
    tensor("x", x)
    if x.dim() < 2 or channels not in (None, x.shape[1]):
        shape = f"[N, {'C' if channels is None else channels}, ...]"
        raise ValueError(f"expected x {shape}, got {list(x.shape)}")


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
    relu_input(x)
    layers = {
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    same_kind(x, **layers)
    channels = x.shape[1]
    _shape("fc1_weight", fc1_weight, ("C // r", channels), f" for x {list(x.shape)}")
    hidden = fc1_weight.shape[0]
    if hidden == 0:
        raise ValueError(
            "expected a hidden layer of at least one value, got fc1_weight "
            f"{list(fc1_weight.shape)}"
        )
    _shape("fc1_bias", fc1_bias, (hidden,))
    _shape("fc2_weight", fc2_weight, (4 * channels, hidden), f" for x {list(x.shape)}")
    _shape("fc2_bias", fc2_bias, (4 * channels,))


def pyramid(features: Sequence[Tensor], in_channels: int, high_offset: str) -> None:
    """Raise unless ``features`` is a pyramid that a block with ``in_channels`` inputs can read.

    Raises:
        TypeError: no sequence of tensors.
        ValueError: no level; a level that is not [N, in_channels, H, W]; levels of different batch,
            dtype or device; sizes that are not ceil(H / 2), ceil(W / 2) of the finer level (unless
            ``high_offset`` is "aligned", which takes any sizes).
    """
    one_of("high_offset", high_offset, HIGH_OFFSETS)
    levels(features)
    first = features[0]
    for level, x in enumerate(features):
        if x.dim() != 4 or x.shape[1] != in_channels:
            advice = (
                "in_channels of the head must equal the channels of the pyramid"
                if x.dim() == 4
                else "a single image is x[None]"
            )
            raise ValueError(
                f"expected level {level} of shape [N, {in_channels}, H, W], got {list(x.shape)}; "
                + advice
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
            larger = size[0] > finer[0] and size[1] > finer[1]
            advice = (
                "the finest level comes first: reverse them"
                if larger
                else "pad the image to a multiple of the coarsest stride"
            )
            raise ValueError(
                f"expected level {level} of size {expected} (half of level {level - 1}'s "
                f"{finer[0]}x{finer[1]}, rounded up), got {size[0]}x{size[1]}; {advice}, or use "
                'high_offset="aligned", which takes any sizes'
            )


def block_parameters(
    parameters: BlockParameters, num_groups: int, features: Sequence[Tensor] = ()
) -> tuple[int, int]:
    """Return (in_channels, out_channels); raise upon parameters that do not fit.

    Raises:
        TypeError: no ``BlockParameters`` of tensors.
        ValueError: shapes, devices or types that do not fit.
    """
    advice = "DyHeadBlock.parameters_tuple() returns them"
    instance("the parameters of a block", parameters, BlockParameters, advice)
    for name in BRANCHES:
        instance(name, getattr(parameters, name), BranchParameters)
    weight, fc1_weight = parameters.mid.weight, parameters.fc1_weight
    tensor("mid.weight", weight)
    tensor("fc1_weight", fc1_weight)
    if weight.dim() != 4 or fc1_weight.dim() != 2:
        _shape("mid.weight", weight, ("C_out", "C_in", "3", "3"))
        _shape("fc1_weight", fc1_weight, ("C_out // r", "C_out"))
    out_channels, in_channels = weight.shape[:2]
    hidden = fc1_weight.shape[0]
    if 0 in (out_channels, in_channels, hidden):
        raise ValueError(
            "expected channels and a hidden layer of at least 1, got mid.weight "
            f"{list(weight.shape)} and fc1_weight {list(fc1_weight.shape)}"
        )
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
    for name in BRANCHES:
        branch: BranchParameters = getattr(parameters, name)
        expected[f"{name}.weight"] = (branch.weight, (out_channels, in_channels, 3, 3))
        for field in ("bias", "norm_weight", "norm_bias"):
            expected[f"{name}.{field}"] = (getattr(branch, field), (out_channels,))
    first = features[0] if len(features) > 0 else weight
    same_kind(first, BIASES, **{name: value for name, (value, _) in expected.items()})
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"expected {name} of shape {list(shape)} (from mid.weight {list(weight.shape)}), "
                f"got {list(value.shape)}"
            )
    if not _whole(num_groups):
        raise ValueError(f"expected num_groups as an integer, got {num_groups!r}")
    if num_groups < 1 or out_channels % num_groups:
        raise ValueError(
            f"expected out_channels divisible by num_groups, got {out_channels} channels and "
            f"{num_groups} groups"
        )
    return in_channels, out_channels


def stackable(features: Sequence[Tensor], mode: str, size: Sequence[int] | None = None) -> None:
    """Check the arguments of ``stack_pyramid``."""
    one_of("mode", mode, RESIZE_MODES)
    levels(features)
    first = features[0]
    _shape("level 0", first, ("N", "C", "H", "W"))
    n, channels = first.shape[:2]
    for level, x in enumerate(features):
        _shape(f"level {level}", x, (n, channels, "H", "W"), " (as level 0)")
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"expected {first.dtype} on {first.device} on every level (as on level 0), "
                f"got {x.dtype} on {x.device} on level {level}"
            )
    if size is None or torch.jit.is_tracing():  # which has sizes as tensors
        return
    whole = isinstance(size, (list, tuple)) and all(map(_whole, size))
    if not whole or len(size) != 2 or min(size) < 0:
        raise ValueError(f"expected size as two integers >= 0, (H, W), got {size!r}")


def unified_features(
    features: Tensor, num_levels: int | None = None, channels: int | None = None
) -> None:
    """Raise unless ``features`` is one tensor of stacked levels, as many as said."""
    tensor("features", features)
    _shape("features", features, ("N", num_levels or "L", channels or "C", "H", "W"))


def unified_parameters(parameters: Any, kind: type) -> None:
    """Raise unless these are the parameters of a block of the paper's form."""
    advice = "UnifiedDyHeadBlock.parameters_tuple() returns them"
    instance("the parameters of a block", parameters, kind, advice)


def scale_attention(features: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check the arguments of ``scale_attention``."""
    unified_features(features)
    same_kind(features, weight=weight, bias=bias)
    count = features.shape[1]
    why = f" for {count} levels"
    _shape("weight", weight, (count, count), why)
    _shape("bias", bias, (count,), why)


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
    same_kind(
        features,
        ("gates",),
        weight=weight,
        offset_weight=offset_weight,
        offset_bias=offset_bias,
        gates=gates,
    )
    n, count, channels, _, _ = features.shape
    why = f" for features {list(features.shape)}"
    _shape("weight", weight, (count, "C_out", channels, 3, 3), why)
    if 0 in weight.shape:
        raise ValueError(
            f"expected at least one level and channel, got features {list(features.shape)} and "
            f"weight {list(weight.shape)}"
        )
    _shape("offset_weight", offset_weight, (3 * TAPS, channels, 3, 3), why)
    _shape("offset_bias", offset_bias, (3 * TAPS,))
    _shape("gates", gates, (n, count), why)

"""Definitions that the reference and the compiled path share: names, resizing, small formulas."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import checks
from dyhead_cuda.pyramid import UPSAMPLES, HighOffset, Upsample, halved

Activation = Literal["hsigmoid", "sigmoid"]
Targets = Literal["all", "median"]
ResizeMode = Literal["bilinear", "nearest", "max"]

# The relative L2 error against the reference in float64 that a result of one operator may have;
# gradients may have twice that. "tf32": float32 whose products round their operands to TF32.
TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 8e-3}


class UnifiedParameters(NamedTuple):
    """All parameters of one block of the paper's form, as tensors of any floating type.

    Args:
        scale_weight: [L, L], of the linear map over the level means.
        scale_bias: [L].
        offset_weight: [27, C, 3, 3]: 18 offsets (dy, dx per tap, in pixels), then 9 mask logits.
        offset_bias: [27].
        spatial_weight: [L, C_out, C, 3, 3], a 3x3 convolution for each level that is read.
        fc1_weight: [C_out // r, C_out], of the dynamic ReLU.
        fc1_bias: [C_out // r].
        fc2_weight: [4 * C_out, C_out // r].
        fc2_bias: [4 * C_out].

    Example:
        >>> import dyhead_cuda
        >>> block = dyhead_cuda.UnifiedDyHead(levels=3, channels=8, num_blocks=1).blocks[0]
        >>> block.parameters_tuple().spatial_weight.shape
        torch.Size([3, 8, 8, 3, 3])
    """

    scale_weight: Tensor
    scale_bias: Tensor
    offset_weight: Tensor
    offset_bias: Tensor
    spatial_weight: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def hsigmoid(x: Tensor) -> Tensor:
    """The hard sigmoid of the published code's gates: relu6(x + 3) / 6.

    Args:
        x: of any shape and floating type.

    Returns:
        As ``x``, with values from 0 to 1.

    Raises:
        TypeError: no tensor.
        ValueError: a tensor of no floating type.

    Source: microsoft/DynamicHead, ``dyhead/dyrelu.py``.

    Example:
        >>> import torch
        >>> hsigmoid(torch.tensor([-4.0, 0.0, 3.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    checks.tensor("x", x)
    return F.relu6(x + 3) / 6


def to_compute(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def relative_l2(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN if there is one.

    Args:
        actual: of any shape and floating type.
        expected: of the same shape; more precise, and on any device.
        floor: the least norm to divide by. Upon a norm of zero the error is absolute.

    Raises:
        ValueError: other shapes.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"expected the shape {expected.shape}, got {actual.shape}")
    a = actual.detach().double()
    b = expected.detach().to(a.device).double()
    error, size = float((a - b).norm()), max(float(b.norm()), floor)
    return error / size if size > 0 else error


def gradient_errors(
    actual: Sequence[Tensor], expected: Sequence[Tensor], floor: float = 1e-3
) -> list[float]:
    """The relative L2 error of each gradient, over its norm or ``floor`` times the largest norm.

    The second is for gradients whose terms cancel: that of a bias before a normalisation, for one.

    Raises:
        ValueError: other numbers of gradients, or other shapes.
    """
    largest = max((float(g.detach().double().norm()) for g in expected), default=0.0)
    return [relative_l2(a, b, floor * largest) for a, b in zip(actual, expected, strict=True)]


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off on the device of ``x``: the head chooses its own precision."""
    kind = x.device.type
    # Where it is off already, an exporter must not see a switch: it makes a subgraph of one.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def resize(x: Tensor, size: Sequence[int], mode: Upsample) -> Tensor:
    """A map of another size: bilinear with align_corners=True, or nearest as torch has it.

    Args:
        x: [N, C, h, w].
        size: (H, W).
        mode: "bilinear" or "nearest".

    Returns:
        [N, C, H, W].

    Raises:
        ValueError: an unknown mode.
    """
    checks.one_of("upsample", mode, UPSAMPLES)
    if 0 in x.shape or 0 in size:
        return x.new_zeros(*x.shape[:2], *size)
    corners = True if mode == "bilinear" else None
    return F.interpolate(x, tuple(size), mode=mode, align_corners=corners)


def finer_for_low(finer: Tensor, size: Sequence[int]) -> Tensor:
    """The finer level as ``low`` reads it: resized only where half of it is not ``size``."""
    if halved(finer.shape) == tuple(size):
        return finer
    return resize(finer, (2 * size[0], 2 * size[1]), "bilinear")


def _flat_prefix(t: Tensor, size: tuple[int, int]) -> Tensor:
    """The first K * h * w values of each image's [K, H, W], read as [K, h, w]."""
    n, k = t.shape[:2]
    return t.flatten(1)[:, : k * size[0] * size[1]].reshape(n, k, *size)


def _crop(t: Tensor, size: tuple[int, int]) -> Tensor:
    cropped = t[..., : size[0], : size[1]]
    # Open sizes of an export: only this says that the map is at least as large.
    torch._check(cropped.shape[-2] == size[0])
    torch._check(cropped.shape[-1] == size[1])
    return cropped


# How the high branch reads offset and mask, by the name of the variant. "aligned" resizes the
# coarser level instead, and reads the predictions as they are.
READ_RULES = {
    "flat": (_flat_prefix, _flat_prefix),
    "crop": (_crop, _crop),
    "mmdet_main": (_flat_prefix, _crop),
}


def _check_readable(offset: Tensor, mask: Tensor, size: Sequence[int]) -> None:
    checks.integers(h=size[0], w=size[1])
    n, _, height, width = offset.shape
    if mask.shape[0] != n or mask.shape[2:] != offset.shape[2:]:
        raise ValueError(
            f"expected offset and mask of one batch and size, got {list(offset.shape)} and "
            f"{list(mask.shape)}"
        )
    if not (0 <= size[0] <= height and 0 <= size[1] <= width):
        raise ValueError(
            f"expected a size of at most {(height, width)}, that of the predictions, got "
            f"{tuple(size)}"
        )


def high_offset_and_mask(
    offset: Tensor, mask: Tensor, size: tuple[int, int], high_offset: HighOffset
) -> tuple[Tensor, Tensor]:
    """What the ``high`` branch on a level of ``size`` reads of the finer level's predictions.

    Args:
        offset: [N, 18, H, W] in pixels, predicted at the finer level.
        mask: [N, 9, H, W], likewise.
        size: (h, w) of the coarser level, at most (H, W).
        high_offset: "flat" (released checkpoints), "crop", or "mmdet_main" (offset flat, mask
            cropped); "aligned" does not read predictions at another resolution.

    Returns:
        offset [N, 18, h, w] and mask [N, 9, h, w].

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: another name, or maps of another shape.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``; mmdet, ``necks/dyhead.py``.

    Example:
        >>> import torch
        >>> offset, mask = torch.randn(1, 18, 8, 8), torch.rand(1, 9, 8, 8)
        >>> read, _ = high_offset_and_mask(offset, mask, (4, 4), "crop")
        >>> torch.equal(read, offset[:, :, :4, :4])
        True
    """
    checks.one_of("high_offset", high_offset, READ_RULES)
    for name, value in (("offset", offset), ("mask", mask)):
        checks.tensor(name, value)
        if value.dim() != 4:
            raise ValueError(f"expected {name} [N, K, H, W], got {list(value.shape)}")
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"expected size as two integers (h, w), got {size!r}")
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        _check_readable(offset, mask, size)
    offset_rule, mask_rule = READ_RULES[high_offset]
    return offset_rule(offset, size), mask_rule(mask, size)


def median_level(levels: int) -> int:
    """Index of the level that a pyramid is resized to; the coarser middle one of an even number.

    Args:
        levels: how many there are.

    Returns:
        The index, counted from the finest level.

    Raises:
        ValueError: no integer of at least 1.

    Example:
        >>> median_level(5)
        2
    """
    checks.positive(levels=levels)
    return levels // 2


def target_levels(targets: Targets, levels: int) -> list[int]:
    """The levels that the spatial attention computes: all, or the median one.

    Raises:
        ValueError: unknown targets.
    """
    checks.one_of("targets", targets, checks.TARGETS)
    return [median_level(levels)] if targets == "median" else list(range(levels))


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, H, W] is dense with its channels innermost. vmap cannot tell: False."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x):
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def output_format(
    inputs: Sequence[Tensor], memory_format: torch.memory_format
) -> torch.memory_format:
    """The memory format of results: the one asked for, or that of the inputs, as convolutions do.

    Args:
        inputs: maps [N, C, H, W] of one pyramid.
        memory_format: torch.contiguous_format, torch.channels_last, or torch.preserve_format, which
            is channels_last where all inputs are (and not contiguous as well), else contiguous.

    Raises:
        ValueError: another memory format.
    """
    checks.memory_format(memory_format)
    if memory_format != torch.preserve_format:
        return memory_format
    if all(x.is_contiguous() for x in inputs):
        return torch.contiguous_format
    if all(is_channels_last(x) for x in inputs):
        return torch.channels_last
    return torch.contiguous_format

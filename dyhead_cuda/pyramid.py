"""What a pyramid of feature maps is, and what a block's parameters are called."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

HighOffset = Literal["flat", "crop", "mmdet_main", "aligned"]
HIGH_OFFSETS: tuple[str, ...] = get_args(HighOffset)
Upsample = Literal["bilinear", "nearest"]
UPSAMPLES: tuple[str, ...] = get_args(Upsample)

TAPS = 9
OFFSET_CHANNELS = 2 * TAPS

Features = TypeVar("Features", list[Tensor], tuple[Tensor, ...], dict[str, Tensor])


class BranchParameters(NamedTuple):
    """One deformable branch: a 3x3 modulated deformable convolution and its group normalisation."""

    weight: Tensor  # [C_out, C_in, 3, 3]
    bias: Tensor | None  # [C_out]
    norm_weight: Tensor  # [C_out]
    norm_bias: Tensor  # [C_out]

    def to(self, dtype: torch.dtype) -> BranchParameters:
        """All of them in one type; what has it already is not copied."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return BranchParameters(
            self.weight.to(dtype), bias, self.norm_weight.to(dtype), self.norm_bias.to(dtype)
        )


class BlockParameters(NamedTuple):
    """All parameters of one published block, in the order in which the block uses them."""

    offset_weight: Tensor  # [27, C_in, 3, 3]: 18 offsets (dy, dx per tap), then 9 mask logits
    offset_bias: Tensor  # [27]
    low: BranchParameters  # reads the finer level l - 1 with stride 2
    mid: BranchParameters  # reads level l
    high: BranchParameters  # reads the coarser level l + 1, then upsampled
    gate_weight: Tensor  # [C_out]
    gate_bias: Tensor  # [1]
    fc1_weight: Tensor  # [C_out // reduction, C_out]
    fc1_bias: Tensor  # [C_out // reduction]
    fc2_weight: Tensor  # [4 * C_out, C_out // reduction]
    fc2_bias: Tensor  # [4 * C_out]

    @property
    def task(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parameters of the dynamic ReLU."""
        return self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias

    def to(self, dtype: torch.dtype) -> BlockParameters:
        """All of them in one type; what has it already is not copied."""
        return BlockParameters(
            self.offset_weight.to(dtype),
            self.offset_bias.to(dtype),
            self.low.to(dtype),
            self.mid.to(dtype),
            self.high.to(dtype),
            self.gate_weight.to(dtype),
            self.gate_bias.to(dtype),
            *(tensor.to(dtype) for tensor in self.task),
        )


def halved(size: Sequence[int]) -> tuple[int, int]:
    """The size of a 3x3, stride 2, padding 1 convolution's output: ceil(H / 2), ceil(W / 2)."""
    return (size[-2] + 1) // 2, (size[-1] + 1) // 2


def unpack(features: list[Tensor] | tuple[Tensor, ...] | dict[str, Tensor]) -> list[Tensor]:
    """The levels of a list, tuple or dict of feature maps, finest first as they stand."""
    if isinstance(features, Mapping):
        return list(features.values())
    if isinstance(features, list | tuple):
        return list(features)
    raise TypeError(
        "expected a list, tuple or dict of feature maps [N, C, H, W], got "
        f"{type(features).__name__}; wrap a single map in a list"
    )


def repack(features: Features, levels: Sequence[Tensor]) -> Features:
    """``levels`` in a container like ``features``: the same keys, or the same kind of sequence."""
    packed: Any
    if isinstance(features, dict):
        packed = copy.copy(features)  # keeps what a subclass has beside its keys
        packed.update(zip(features.keys(), levels, strict=True))
    elif isinstance(features, Mapping):
        packed = dict(zip(features.keys(), levels, strict=True))
    elif hasattr(features, "_fields"):
        packed = type(features)(*levels)
    else:
        packed = type(features)(levels)
    return packed

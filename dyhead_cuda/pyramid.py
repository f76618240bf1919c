"""What a pyramid of feature maps is, and what a block's parameters are called."""

from __future__ import annotations

import copy
from collections import OrderedDict
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


def _of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in a type; one that has it already costs an exporter's trace nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class BranchParameters(NamedTuple):
    """One deformable branch: a 3x3 modulated deformable convolution and its group normalisation.

    Args:
        weight: [C_out, C_in, 3, 3], of any floating type, as all of them.
        bias: [C_out] or None.
        norm_weight: [C_out].
        norm_bias: [C_out].

    Example:
        >>> from dyhead_cuda.modules import DeformBranch
        >>> DeformBranch(8, 16, bias=False).parameters_tuple().weight.shape
        torch.Size([16, 8, 3, 3])
    """

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor

    def to(self, dtype: torch.dtype) -> BranchParameters:
        """All of them in one type; what has it already is not copied."""
        bias = None if self.bias is None else _of(self.bias, dtype)
        norm = _of(self.norm_weight, dtype), _of(self.norm_bias, dtype)
        return BranchParameters(_of(self.weight, dtype), bias, *norm)


class BlockParameters(NamedTuple):
    """All parameters of one published block, in the order in which the block uses them.

    Args:
        offset_weight: [27, C_in, 3, 3]: 18 offsets (dy, dx per tap, in pixels), then 9 mask logits;
            of any floating type, as all of them.
        offset_bias: [27].
        low: the branch that reads the finer level l - 1 with stride 2.
        mid: the branch that reads level l.
        high: the branch that reads the coarser level l + 1 and is then upsampled.
        gate_weight: [C_out], of the scale gate.
        gate_bias: [1].
        fc1_weight: [C_out // reduction, C_out], of the dynamic ReLU.
        fc1_bias: [C_out // reduction].
        fc2_weight: [4 * C_out, C_out // reduction].
        fc2_bias: [4 * C_out].

    Example:
        >>> import dyhead_cuda
        >>> parameters = dyhead_cuda.DyHeadBlock(8, 16).parameters_tuple()
        >>> parameters.offset_weight.shape, parameters.mid.weight.shape
        (torch.Size([27, 8, 3, 3]), torch.Size([16, 8, 3, 3]))
    """

    offset_weight: Tensor
    offset_bias: Tensor
    low: BranchParameters
    mid: BranchParameters
    high: BranchParameters
    gate_weight: Tensor
    gate_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor

    def task(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parameters of the dynamic ReLU; no property, which older compilers cannot read."""
        return self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias

    def to(self, dtype: torch.dtype) -> BlockParameters:
        """All of them in one type; what has it already is not copied."""
        return BlockParameters(
            _of(self.offset_weight, dtype),
            _of(self.offset_bias, dtype),
            self.low.to(dtype),
            self.mid.to(dtype),
            self.high.to(dtype),
            _of(self.gate_weight, dtype),
            _of(self.gate_bias, dtype),
            *(_of(tensor, dtype) for tensor in self.task()),
        )


def halved(size: Sequence[int]) -> tuple[int, int]:
    """The size of a 3x3, stride 2, padding 1 convolution's output: ceil(H / 2), ceil(W / 2)."""
    return (size[-2] + 1) // 2, (size[-1] + 1) // 2


def unpack(features: list[Tensor] | tuple[Tensor, ...] | dict[str, Tensor]) -> list[Tensor]:
    """The levels of a list, tuple or dict of feature maps, finest first as they stand."""
    if isinstance(features, Mapping):
        return list(features.values())
    if isinstance(features, (list, tuple)):
        return list(features)
    raise TypeError(
        "expected a list, tuple or dict of feature maps [N, C, H, W], got "
        f"{type(features).__name__}; wrap a single map in a list"
    )


def repack(features: Features, levels: Sequence[Tensor]) -> Features:
    """``levels`` in a container like ``features``: the same keys, or the same kind of sequence."""
    packed: Any
    if isinstance(features, dict):
        pairs = zip(features.keys(), levels, strict=True)
        if type(features) in (dict, OrderedDict):  # torch.compile cannot copy them
            packed = type(features)(pairs)
        else:
            packed = copy.copy(features)  # keeps what a subclass has beside its keys
            packed.update(pairs)
    elif isinstance(features, Mapping):
        packed = dict(zip(features.keys(), levels, strict=True))
    elif hasattr(features, "_fields"):
        packed = type(features)(*levels)
    else:
        packed = type(features)(levels)
    return packed

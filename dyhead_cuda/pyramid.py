"""What a pyramid of feature maps is, and what a block's parameters are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar, cast, get_args

from torch import Tensor

HighOffset = Literal["flat", "crop", "mmdet_main", "aligned"]
HIGH_OFFSETS: tuple[str, ...] = get_args(HighOffset)

TAPS = 9
OFFSET_CHANNELS = 2 * TAPS

Features = TypeVar("Features", list[Tensor], tuple[Tensor, ...], dict[str, Tensor])


class BranchParameters(NamedTuple):
    """One deformable branch: a 3x3 modulated deformable convolution and its group normalisation."""

    weight: Tensor  # [C_out, C_in, 3, 3]
    bias: Tensor | None  # [C_out]
    norm_weight: Tensor  # [C_out]
    norm_bias: Tensor  # [C_out]


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


def halved(size: Sequence[int]) -> tuple[int, int]:
    """The size of a 3x3, stride 2, padding 1 convolution's output: ceil(H / 2), ceil(W / 2)."""
    return (size[-2] + 1) // 2, (size[-1] + 1) // 2


def unpack(features: Features) -> list[Tensor]:
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
    if isinstance(features, Mapping):
        pairs = list(zip(features.keys(), levels, strict=True))
        packed = type(features)() if isinstance(features, dict) else {}
        packed.update(pairs)
        return cast(Features, packed)
    if isinstance(features, tuple) and hasattr(features, "_fields"):
        return cast(Features, type(features)(*levels))
    return cast(Features, tuple(levels) if isinstance(features, tuple) else list(levels))

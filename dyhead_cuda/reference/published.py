"""The published form: blocks on a pyramid of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import checks
from dyhead_cuda.numerics import (
    finer_for_low,
    high_offset_and_mask,
    hsigmoid,
    no_autocast,
    resize,
    to_compute,
)
from dyhead_cuda.pyramid import (
    UPSAMPLES,
    BlockParameters,
    BranchParameters,
    HighOffset,
    Upsample,
)
from dyhead_cuda.reference.operators import dynamic_relu, modulated_deform_conv2d, offset_and_mask


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.numel() == 0:
        return x
    # As [N, C, H * W]: torch's kernel for channels_last maps loses digits on a map of one pixel.
    return torch.group_norm(x.flatten(2), num_groups, weight, bias, eps).view(x.shape)


def _check_block(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    high_offset: HighOffset,
    upsample: Upsample,
    num_groups: int,
    eps: float,
) -> None:
    checks.levels(features)
    in_channels, _ = checks.block_parameters(parameters, num_groups, features)
    checks.pyramid(features, in_channels, high_offset)
    checks.one_of("upsample", upsample, UPSAMPLES)
    checks.epsilon(eps)


def branch_maps(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    *,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
    num_groups: int = 16,
    eps: float = 1e-5,
) -> list[dict[str, Tensor]]:
    """The branches of every level after their normalisation, before gates and average.

    Args:
        features: levels [N, C_in, H_l, W_l] of float32 or float64, finest first.
        parameters: see :class:`~dyhead_cuda.BlockParameters`; of the dtype of the features.
        high_offset: as for :func:`pyramid_block`.
        upsample: as for :func:`pyramid_block`.
        num_groups: of the group normalisation.
        eps: of the group normalisation.

    Returns:
        Per level, branch name ("mid", then "low" and "high" where there are such levels) to
        [N, C_out, H_l, W_l].

    Raises:
        TypeError: features that are no list or tuple of tensors, or no ``BlockParameters``.
        ValueError: a pyramid or parameters that do not fit, an unknown ``high_offset`` or
            ``upsample``.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``.

    Example:
        >>> import torch, dyhead_cuda
        >>> parameters = dyhead_cuda.DyHeadBlock(8, 16).parameters_tuple()
        >>> levels = [torch.randn(1, 8, side, side) for side in (8, 4)]
        >>> [list(branches) for branches in branch_maps(levels, parameters)]
        [['mid', 'high'], ['mid', 'low']]
    """
    _check_block(features, parameters, high_offset, upsample, num_groups, eps)
    maps = []
    for level, x in enumerate(features):
        size = x.shape[-2:]
        offset, mask = offset_and_mask(x, parameters.offset_weight, parameters.offset_bias)

        def branch(
            source: Tensor, p: BranchParameters, offset: Tensor, mask: Tensor, stride: int = 1
        ) -> Tensor:
            y = modulated_deform_conv2d(source, offset, p.weight, p.bias, stride, 1, 1, mask)
            return _group_norm(y, num_groups, p.norm_weight, p.norm_bias, eps)

        branches = {"mid": branch(x, parameters.mid, offset, mask)}
        if level > 0:
            finer = finer_for_low(features[level - 1], size)
            branches["low"] = branch(finer, parameters.low, offset, mask, stride=2)
        if level + 1 < len(features):
            coarser = features[level + 1]
            if high_offset == "aligned":
                branches["high"] = branch(
                    resize(coarser, size, upsample), parameters.high, offset, mask
                )
            else:
                coarse_size = (coarser.shape[-2], coarser.shape[-1])
                read = high_offset_and_mask(offset, mask, coarse_size, high_offset)
                branches["high"] = resize(branch(coarser, parameters.high, *read), size, upsample)
        maps.append(branches)
    return maps


def branch_gate(branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Scale-aware gate of a branch: hsigmoid(relu(w . mean(branch) + bias)).

    Args:
        branch: [N, C, H, W] of any floating type.
        weight: w, [C], of the dtype of the branch.
        bias: [1].

    Returns:
        [N], from 0.5 to 1.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: a branch of another shape, or of no floating type.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``, ``AttnConv``.

    Example:
        >>> import torch
        >>> branch_gate(torch.ones(2, 8, 4, 4), torch.full((8,), 0.25), torch.tensor([1.0]))
        tensor([1., 1.])
    """
    checks.tensor("branch", branch)
    checks.same_kind(branch, weight=weight, bias=bias)
    if weight.dtype != branch.dtype or bias.dtype != branch.dtype:
        raise ValueError(
            f"expected weight and bias of the branch's {branch.dtype}, got {weight.dtype} and "
            f"{bias.dtype}"
        )
    if branch.dim() < 2 or weight.shape != branch.shape[1:2] or bias.shape != (1,):
        raise ValueError(
            "expected branch [N, C, ...], weight [C] and bias [1], got "
            f"{list(branch.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        )
    return hsigmoid(F.relu(branch.flatten(2).mean(2) @ weight + bias))


def combine_branches(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    *,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
    num_groups: int = 16,
    eps: float = 1e-5,
) -> list[Tensor]:
    """Scale- and spatial-aware attention: the gated, averaged branches before the dynamic ReLU.

    Args:
        features: levels, as for :func:`pyramid_block`.
        parameters: see :class:`~dyhead_cuda.BlockParameters`; of any floating type.
        high_offset: as for :func:`pyramid_block`.
        upsample: as for :func:`pyramid_block`.
        num_groups: of the group normalisation.
        eps: of the group normalisation.

    Returns:
        list of [N, C_out, H_l, W_l], float64 for float64 features and float32 for all others.

    Raises:
        TypeError: features that are no list or tuple of tensors, or no ``BlockParameters``.
        ValueError: a pyramid or parameters that do not fit, with what was expected.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``.

    Example:
        >>> import torch, dyhead_cuda
        >>> parameters = dyhead_cuda.DyHeadBlock(8, 16).parameters_tuple()
        >>> levels = [torch.randn(1, 8, side, side) for side in (8, 4)]
        >>> [tuple(x.shape) for x in combine_branches(levels, parameters)]
        [(1, 16, 8, 8), (1, 16, 4, 4)]
    """
    _check_block(features, parameters, high_offset, upsample, num_groups, eps)
    features = [to_compute(x) for x in features]
    p = parameters.to(features[0].dtype)
    outputs = []
    with no_autocast(features[0]):
        for branches in branch_maps(
            features, p, high_offset=high_offset, upsample=upsample, num_groups=num_groups, eps=eps
        ):
            combined = torch.zeros_like(branches["mid"])
            for branch in branches.values():
                gate = branch_gate(branch, p.gate_weight, p.gate_bias)
                combined = combined + gate.view(-1, 1, 1, 1) * branch
            outputs.append(combined / len(branches))
    return outputs


def pyramid_block(
    features: Sequence[Tensor],
    parameters: BlockParameters,
    *,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
    num_groups: int = 16,
    eps: float = 1e-5,
) -> list[Tensor]:
    """One block of the published head on a pyramid, finest level first.

    Per level: offsets and modulation from a 3x3 convolution; up to three deformable branches (the
    level, the finer one with stride 2, the coarser one upsampled), each with group normalisation
    and a scale-aware gate; their average; dynamic ReLU.

    Args:
        features: levels [N, C_in, H_l, W_l] of one floating type; each level is half of the finer
            one, rounded up.
        parameters: see :class:`~dyhead_cuda.BlockParameters`; of any floating type.
        high_offset: how the ``high`` branch on level l + 1 gets the offsets and mask predicted at
            level l. "flat": the first K * h * w values of each image's contiguous [K, H, W], which
            is what every released checkpoint was trained with; "crop": [:h, :w]; "mmdet_main":
            offset flat, mask cropped; "aligned": level l + 1 is upsampled first and sampled with
            level l's own offsets (the paper's formula), any sizes allowed: where half of the finer
            level, rounded up, is not level l's size [h, w], the ``low`` branch reads it resized to
            [2 h, 2 w], bilinear with align_corners=True.
        upsample: how the ``high`` branch, or for "aligned" the coarser level before it, comes to
            level l's size. "bilinear": with align_corners=True, as published; "nearest": as
            ``F.interpolate(x, size)`` does by default, which many public forks call.
        num_groups: of the group normalisation.
        eps: of the group normalisation.

    Returns:
        list of [N, C_out, H_l, W_l] in the dtype of the features.

    Raises:
        TypeError: features that are no list or tuple of tensors, or no ``BlockParameters``.
        ValueError: a pyramid or parameters that do not fit, with what was expected.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``; mmdet, ``necks/dyhead.py``.

    Example:
        >>> import torch, dyhead_cuda
        >>> parameters = dyhead_cuda.DyHeadBlock(8, 16).parameters_tuple()
        >>> levels = [torch.randn(1, 8, side, side) for side in (8, 4)]
        >>> [tuple(x.shape) for x in pyramid_block(levels, parameters, high_offset="crop")]
        [(1, 16, 8, 8), (1, 16, 4, 4)]
    """
    return [
        dynamic_relu(x, *parameters.task()).to(features[0].dtype)
        for x in combine_branches(
            features,
            parameters,
            high_offset=high_offset,
            upsample=upsample,
            num_groups=num_groups,
            eps=eps,
        )
    ]

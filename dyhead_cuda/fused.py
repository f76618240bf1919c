"""The head on compiled operators: everything is rows of one matrix, all levels go in one call.

A pyramid is one matrix of rows, level-major, then image, then y and x; each row is a pixel's
channels. Each function here computes what the one of the same name in :mod:`dyhead_cuda.reference`
does; arguments have been checked by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from dyhead_cuda import checks
from dyhead_cuda.numerics import (
    Targets,
    is_channels_last,
    no_autocast,
    output_format,
    resize,
    target_levels,
)
from dyhead_cuda.ops.block_coefficients import block_coefficients
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.deform_conv import deform_conv
from dyhead_cuda.ops.fuse_branches import fuse_branches
from dyhead_cuda.ops.jobs import NO_MAP, Job, Map, Plan, ReadRule, Size, UpsampleMode, stack_maps
from dyhead_cuda.ops.pack_levels import pack_levels, unpack_levels
from dyhead_cuda.pyramid import TAPS, BlockParameters, HighOffset, Upsample, halved
from dyhead_cuda.recompute import recomputed

LOW, MID, HIGH = 0, 1, 2

# How the high branch reads offset and mask, by the name of the variant. "aligned" resizes the
# coarser level instead, so that predictions have its size.
READ_RULES: dict[HighOffset, tuple[ReadRule, ReadRule]] = {
    "flat": (ReadRule.FLAT, ReadRule.FLAT),
    "crop": (ReadRule.CROP, ReadRule.CROP),
    "mmdet_main": (ReadRule.FLAT, ReadRule.CROP),
    "aligned": (ReadRule.SAME, ReadRule.SAME),
}

UPSAMPLE_MODES: dict[Upsample, UpsampleMode] = {
    "bilinear": UpsampleMode.BILINEAR,
    "nearest": UpsampleMode.NEAREST,
}


def pack(levels: Sequence[Tensor]) -> Tensor:
    """Levels [N, C, H_l, W_l] of any strides as one matrix of rows [sum N H_l W_l, C].

    One channels_last level is such a matrix already, and is not copied.
    """
    if len(levels) == 1 and is_channels_last(levels[0]):
        return levels[0].permute(0, 2, 3, 1).reshape(-1, levels[0].shape[1])
    return pack_levels(levels)


def levels_of_rows(
    rows: Tensor, sizes: Sequence[Size], images: int, memory_format: torch.memory_format
) -> list[Tensor]:
    """Levels [N, C, H_l, W_l] in a memory format, each a tensor with memory of its own.

    A view of the rows would keep the whole pyramid alive, and autograd refuses in-place operations
    on one of several views. The rows of a single level may be taken as they are.
    """
    if memory_format == torch.contiguous_format:
        return list(unpack_levels(rows, stack_maps(list(sizes), images), images))
    if len(sizes) == 1:
        ((height, width),) = sizes
        return [rows.view(images, height, width, rows.shape[1]).permute(0, 3, 1, 2)]
    return [level.clone() for level in unpack_rows(rows, sizes, images)]


def unpack_rows(rows: Tensor, sizes: Sequence[Size], images: int) -> list[Tensor]:
    """Views [N, C, H_l, W_l], channels_last in memory, of a matrix of rows."""
    parts = rows.split([images * h * w for h, w in sizes])
    return [
        part.view(images, h, w, rows.shape[1]).permute(0, 3, 1, 2)
        for part, (h, w) in zip(parts, sizes, strict=True)
    ]


def predict(rows: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """The 3x3 convolution that predicts offsets and mask logits, as rows [R, 27].

    Of the accumulation type: an offset rounded to bfloat16 would move its sample, and near a whole
    pixel change the slope of the interpolation.
    """
    none = rows.new_zeros(0, 3 * TAPS, dtype=compute_dtype(rows.dtype))
    out, *_ = deform_conv(
        rows,
        none,
        [weight],
        plan,
        [] if bias is None else [bias],
        out_in_compute_dtype=True,
    )
    return out


def predict_plan(maps: list[Map], images: int, predicted: int) -> Plan:
    """A plain 3x3 convolution of the first ``predicted`` maps, with one weight matrix."""
    jobs = [
        Job(out, NO_MAP, [(source, 0)], offset_rule=ReadRule.NONE, mask_rule=ReadRule.NONE)
        for source, out in enumerate(maps[:predicted])
    ]
    return Plan(images, maps, jobs)


class BlockPlan:
    """Jobs of one published block for given sizes: which map each branch reads, and how."""

    def __init__(
        self,
        sizes: tuple[Size, ...],
        images: int,
        high_offset: HighOffset,
        upsample: Upsample = "bilinear",
    ) -> None:
        self.sizes = sizes
        self.up_mode = UPSAMPLE_MODES[upsample]
        source_sizes = list(sizes)
        predictions = stack_maps(list(sizes), images)
        # level, branch, source map, size of the output
        branches: list[tuple[int, int, int, Size]] = []
        # Maps to add to the sources: level, size, how.
        self.resized: list[tuple[int, Size, Upsample]] = []

        def resized(level: int, size: Size, mode: Upsample) -> int:
            self.resized.append((level, size, mode))
            source_sizes.append(size)
            return len(source_sizes) - 1

        for level, size in enumerate(sizes):
            branches.append((level, MID, level, size))
            if level > 0:
                fits = halved(sizes[level - 1]) == size
                doubled = (2 * size[0], 2 * size[1])
                source = level - 1 if fits else resized(level - 1, doubled, "bilinear")
                branches.append((level, LOW, source, size))
            if level + 1 < len(sizes):
                aligned = high_offset == "aligned"
                source = resized(level + 1, size, upsample) if aligned else level + 1
                branches.append((level, HIGH, source, size if aligned else sizes[level + 1]))
        outputs = stack_maps([size for *_, size in branches], images)
        jobs = []
        for (level, branch, source, _), out in zip(branches, outputs, strict=True):
            rules = READ_RULES[high_offset if branch == HIGH else "aligned"]
            stride = (2, 2) if branch == LOW else (1, 1)
            terms, size = [(source, branch)], sizes[level]
            jobs.append(Job(out, predictions[level], terms, stride, *rules, size, self.up_mode))
        sources = stack_maps(source_sizes, images)
        self.predict = predict_plan(sources, images, len(sizes))
        self.deform = Plan(images, sources, jobs)
        self.job_levels = [level for level, *_ in branches]
        self.job_branches = [branch for _, branch, *_ in branches]
        self.levels = [
            (out, [j for j, level_of in enumerate(self.job_levels) if level_of == level])
            for level, out in enumerate(predictions)
        ]
        self.branches = outputs


cached_block_plan = lru_cache(maxsize=256)(BlockPlan)


def block_plan(
    sizes: tuple[Size, ...],
    images: int,
    high_offset: HighOffset,
    upsample: Upsample = "bilinear",
) -> BlockPlan:
    """A plan is a few hundred integers; making it takes longer than a launch, so it is kept."""
    # torch.compile keeps what it traces, and warns of caches that it cannot see into.
    make = BlockPlan if torch.compiler.is_compiling() else cached_block_plan
    return make(sizes, images, high_offset, upsample)


def with_resized(rows: Tensor, plan: BlockPlan, images: int) -> Tensor:
    """The rows of the levels, and behind them those of the maps that the plan resizes."""
    levels = unpack_rows(rows, plan.sizes, images)
    extra = [resize(levels[level], size, mode) for level, size, mode in plan.resized]
    return torch.cat([rows, pack(extra)])


def block_rows(
    holder: list[Tensor],
    parameters: BlockParameters,
    sizes: tuple[Size, ...],
    images: int,
    *,
    high_offset: HighOffset,
    upsample: Upsample,
    num_groups: int,
    eps: float,
) -> Tensor:
    """One published block from rows [R, C_in] to rows [R, C_out] of levels of the same sizes.

    The rows are taken out of ``holder``, so that they can be freed before the last pass.
    """
    rows = holder.pop()
    plan = block_plan(sizes, images, high_offset, upsample)
    p = parameters
    if plan.resized:
        rows = with_resized(rows, plan, images)
    predictions = predict(rows, p.offset_weight, p.offset_bias, plan.predict)
    branches = (p.low, p.mid, p.high)
    y, mean, var, up_mean = deform_conv(
        rows,
        predictions,
        [b.weight for b in branches],
        plan.deform,
        [b.bias for b in branches if b.bias is not None],
        moments=True,
    )
    del rows, predictions  # without gradients nobody needs them: the last pass then fits there
    coefficients = block_coefficients(
        mean,
        var,
        up_mean,
        [b.norm_weight for b in branches],
        [b.norm_bias for b in branches],
        p.gate_weight,
        p.gate_bias,
        *p.task,
        plan.job_levels,
        plan.job_branches,
        num_groups=num_groups,
        eps=eps,
    )
    return fuse_branches(y, *coefficients, images, plan.branches, plan.levels, plan.up_mode)


def pyramid_blocks(
    features: Sequence[Tensor],
    blocks: Sequence[BlockParameters],
    *,
    high_offset: HighOffset,
    upsample: Upsample,
    num_groups: int,
    eps: float,
    recompute: bool,
    memory_format: torch.memory_format,
) -> list[Tensor]:
    """Published blocks in turn; see :func:`dyhead_cuda.functional.pyramid_blocks`.

    The levels become rows once, and levels again at the end: between blocks nothing is copied.
    """
    images = features[0].shape[0]
    sizes = tuple((x.shape[2], x.shape[3]) for x in features)
    run = partial(
        block_rows, high_offset=high_offset, upsample=upsample, num_groups=num_groups, eps=eps
    )
    with no_autocast(features[0]):
        rows = [pack(features)]
        for parameters in blocks:
            arguments = rows, parameters, sizes, images
            rows = [recomputed(run, *arguments) if recompute else run(*arguments)]
        return levels_of_rows(rows[0], sizes, images, memory_format)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: checks.DeformConvGeometry,
) -> Tensor:
    """See :func:`dyhead_cuda.reference.modulated_deform_conv2d`."""
    n, _, height, width = input.shape
    out = Map(0, *geometry.output)
    plan = Plan(
        n,
        [Map(0, height, width)],
        [Job(out, out, [(0, 0)], geometry.stride)],
        geometry.kernel,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        geometry.deform_groups,
        mask_logits=False,
    )
    offset = offset.to(compute_dtype(input.dtype))
    if mask is None:
        mask = offset.new_ones(n, offset.shape[1] // 2, *geometry.output)
    predictions = pack([torch.cat([offset, mask.to(offset.dtype)], dim=1)])
    biases = [] if bias is None else [bias]
    y, *_ = deform_conv(pack([input]), predictions, [weight], plan, biases)
    memory_format = output_format([input], torch.preserve_format)
    return levels_of_rows(y, [geometry.output], n, memory_format)[0]


def spatial_attention(
    features: Tensor,
    weight: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor,
    targets: Targets,
    gates: Tensor | None,
) -> Tensor:
    """See :func:`dyhead_cuda.reference.spatial_attention`: the gates fold into the sampling."""
    n, levels, channels, height, width = features.shape
    dtype = compute_dtype(features.dtype)
    chosen = target_levels(targets, levels)
    with no_autocast(features):
        rows = features.permute(1, 0, 3, 4, 2).reshape(-1, channels)
        maps = stack_maps([(height, width)] * levels, n)
        if gates is None:
            gates = features.new_ones(n, levels, dtype=dtype)
        # conv(gate . F) + bias = gate . conv(F) + bias
        rows_per_level = n * height * width
        first = chosen[0] * rows_per_level
        targets_rows = rows[first : first + len(chosen) * rows_per_level]
        outputs = stack_maps([(height, width)] * len(chosen), n)
        logits = predict(targets_rows, offset_weight, None, predict_plan(outputs, n, len(outputs)))
        logits = logits.view(len(chosen), n, height * width * 3 * TAPS)
        chosen_gates = gates.to(dtype).t()[chosen].unsqueeze(2)
        logits = (logits * chosen_gates).view(-1, 3 * TAPS) + offset_bias.to(dtype)
        jobs = [Job(out, out, [(level, level) for level in range(levels)]) for out in outputs]
        plan = Plan(n, maps, jobs)
        y, *_ = deform_conv(rows, logits, weight.unbind(), plan, gates=gates / levels)
    return y.view(len(chosen), n, height, width, y.shape[1]).permute(1, 0, 4, 2, 3)

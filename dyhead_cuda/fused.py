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
from dyhead_cuda.ops.jobs import Job, Plan, ReadRule, Size, UpsampleMode, map_rows
from dyhead_cuda.ops.offset_deform_conv import offset_deform_conv
from dyhead_cuda.ops.pack_levels import pack_levels, unpack_levels
from dyhead_cuda.pyramid import (
    TAPS,
    BlockParameters,
    BranchParameters,
    HighOffset,
    Upsample,
    halved,
)
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
        return unpack_levels(rows, sizes, images)
    if len(sizes) == 1:
        ((height, width),) = sizes
        return [rows.view(images, height, width, rows.shape[1]).permute(0, 3, 1, 2)]
    return [level.clone() for level in unpack_rows(rows, sizes, images)]


def unpack_rows(rows: Tensor, sizes: Sequence[Size], images: int) -> list[Tensor]:
    """Views [N, C, H_l, W_l], channels_last in memory, of a matrix of rows."""
    parts = rows.split(map_rows(sizes, images))
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


def predict_plan(sizes: Sequence[Size], images: int) -> Plan:
    """A plain 3x3 convolution of maps, with one weight matrix."""
    jobs = [Job(size, None, [(source, 0)]) for source, size in enumerate(sizes)]
    # A map of no pixels: autograd and AOTInductor misread an empty list of sizes.
    return Plan(images, sizes, [(0, 0)], jobs)


class BlockPlan:
    """Jobs of one published block for given sizes: which map each branch reads, and how."""

    def __init__(
        self,
        sizes: tuple[Size, ...],
        images: int,
        high_offset: HighOffset,
        upsample: Upsample = "bilinear",
    ) -> None:
        self.sizes, self.images = sizes, images
        self.up_mode = UPSAMPLE_MODES[upsample]
        sources = list(sizes)
        # Maps to add to the sources: level, size, how.
        self.resized: list[tuple[int, Size, Upsample]] = []

        def resized(level: int, size: Size, mode: Upsample) -> int:
            self.resized.append((level, size, mode))
            sources.append(size)
            return len(sources) - 1

        jobs: list[Job] = []
        self.job_levels: list[int] = []
        self.job_branches: list[int] = []

        def add(level: int, branch: int, source: int, out: Size) -> None:
            rules = READ_RULES[high_offset if branch == HIGH else "aligned"]
            stride = (2, 2) if branch == LOW else (1, 1)
            jobs.append(
                Job(out, level, [(source, branch)], stride, *rules, sizes[level], self.up_mode)
            )
            self.job_levels.append(level)
            self.job_branches.append(branch)

        for level, size in enumerate(sizes):
            add(level, MID, level, size)
            if level > 0:
                fits = halved(sizes[level - 1]) == size
                doubled = (2 * size[0], 2 * size[1])
                add(
                    level, LOW, level - 1 if fits else resized(level - 1, doubled, "bilinear"), size
                )
            if level + 1 < len(sizes):
                aligned = high_offset == "aligned"
                source = resized(level + 1, size, upsample) if aligned else level + 1
                add(level, HIGH, source, size if aligned else sizes[level + 1])
        self.deform = Plan(images, sources, sizes, jobs)
        self.branches = [job.out for job in jobs]
        self.levels = [
            (size, [j for j, job_level in enumerate(self.job_levels) if job_level == level])
            for level, size in enumerate(sizes)
        ]


cached_block_plan = lru_cache(maxsize=256)(BlockPlan)


def block_plan(
    sizes: tuple[Size, ...],
    images: int,
    high_offset: HighOffset,
    upsample: Upsample = "bilinear",
) -> BlockPlan:
    """A plan is a few hundred integers; making it takes longer than a launch, so it is kept."""
    # Under a tracer sizes may be symbols, which are no keys, and torch.compile warns of caches.
    numbers = (images, *(side for size in sizes for side in size))
    traced = torch.compiler.is_compiling() or any(type(number) is not int for number in numbers)
    return (BlockPlan if traced else cached_block_plan)(sizes, images, high_offset, upsample)


def with_resized(rows: Tensor, plan: BlockPlan) -> Tensor:
    """The rows of the levels, and behind them those of the maps that the plan resizes."""
    levels = unpack_rows(rows, plan.sizes, plan.images)
    extra = [resize(levels[level], size, mode) for level, size, mode in plan.resized]
    return torch.cat([rows, pack(extra)])


def _biases(branches: Sequence[BranchParameters]) -> list[Tensor]:
    """The operator takes a bias of every branch or none: zeros where only some have one."""
    if all(b.bias is None for b in branches):
        return []
    return [b.norm_bias.new_zeros(len(b.norm_bias)) if b.bias is None else b.bias for b in branches]


def block_rows(
    holder: list[Tensor], parameters: BlockParameters, plan: BlockPlan, num_groups: int, eps: float
) -> Tensor:
    """One published block from rows [R, C_in] to rows [R, C_out] of levels of the same sizes.

    The rows are taken out of ``holder``, so that they can be freed before the last pass.
    """
    rows = holder.pop()
    p = parameters
    if plan.resized:
        rows = with_resized(rows, plan)
    branches = (p.low, p.mid, p.high)
    y, mean, var, up_mean = offset_deform_conv(
        rows,
        p.offset_weight,
        p.offset_bias,
        [b.weight for b in branches],
        plan.deform,
        _biases(branches),
    )
    del rows  # without gradients nobody needs them: the last pass then fits there
    coefficients = block_coefficients(
        mean,
        var,
        up_mean,
        [b.norm_weight for b in branches],
        [b.norm_bias for b in branches],
        p.gate_weight,
        p.gate_bias,
        *p.task(),
        plan.job_levels,
        plan.job_branches,
        num_groups=num_groups,
        eps=eps,
    )
    return fuse_branches(y, *coefficients, plan.images, plan.branches, plan.levels, plan.up_mode)


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
    plan = block_plan(sizes, images, high_offset, upsample)
    run = partial(block_rows, plan=plan, num_groups=num_groups, eps=eps)
    with no_autocast(features[0]):
        rows = [pack(features)]
        for parameters in blocks:
            rows = [recomputed(run, rows, parameters) if recompute else run(rows, parameters)]
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
    plan = Plan(
        n,
        [(height, width)],
        [geometry.output],
        [Job(geometry.output, 0, [(0, 0)], geometry.stride)],
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
        if gates is None:
            gates = features.new_ones(n, levels, dtype=dtype)
        # conv(gate . F) + bias = gate . conv(F) + bias
        rows_per_level = n * height * width
        first = chosen[0] * rows_per_level
        targets_rows = rows[first : first + len(chosen) * rows_per_level]
        outputs = [(height, width)] * len(chosen)
        logits = predict(targets_rows, offset_weight, None, predict_plan(outputs, n))
        logits = logits.view(len(chosen), n, height * width * 3 * TAPS)
        chosen_gates = gates.to(dtype).t()[chosen].unsqueeze(2)
        logits = (logits * chosen_gates).view(-1, 3 * TAPS) + offset_bias.to(dtype)
        terms = [(level, level) for level in range(levels)]
        jobs = [Job(out, target, terms) for target, out in enumerate(outputs)]
        plan = Plan(n, [(height, width)] * levels, outputs, jobs)
        y, *_ = deform_conv(rows, logits, weight.unbind(), plan, gates=gates / levels)
    return y.view(len(chosen), n, height, width, y.shape[1]).permute(1, 0, 4, 2, 3)

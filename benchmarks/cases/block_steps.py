"""The cases that are one step of a block, given the results of the steps before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import peers
from benchmarks.cases.common import (
    between_pixels,
    branch_counts,
    branch_sizes,
    conv_flops,
    in_compute_dtype,
    layers_and_compiled,
    pixels_of,
    relu_flops,
    relu_parameters,
    rows_of,
)
from benchmarks.cases.problems import (
    Implementation,
    Layout,
    Maps,
    Problem,
    Run,
    Setting,
    Work,
    compiled,
    dense,
    on_each_operator,
    ours,
    parameter_count,
    random_maps,
    randomised,
    reference_of,
)
from dyhead_cuda import fused, reference
from dyhead_cuda.modules import DynamicReLU, ModulatedDeformConv2d
from dyhead_cuda.ops.block_coefficients import block_coefficients as run_block_coefficients
from dyhead_cuda.ops.deform_conv import deform_conv as run_deform_conv
from dyhead_cuda.ops.fuse_branches import fuse_branches as run_fuse_branches
from dyhead_cuda.pyramid import OFFSET_CHANNELS, TAPS


def branches(setting: Setting) -> Problem:
    """All deformable convolutions of a block, given the predictions: one call of ours."""
    s, n = setting.shapes, setting.batch
    count, sizes = len(s.levels), branch_sizes(s.levels)
    plan = fused.block_plan(s.levels, n, "flat")
    shapes = [(s.channels, *size) for size in s.levels]
    predicted = [(3 * TAPS, *size) for size in s.levels]
    convs = [ModulatedDeformConv2d(s.channels, s.channels, 3, padding=1) for _ in range(3)]
    module = randomised(nn.ModuleList(convs))

    def own(convs: Any, inputs: Maps) -> Maps:
        rows, predictions = inputs
        weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
        return [run_deform_conv(rows, predictions, weights, plan.deform, biases, moments=True)[0]]

    def encode(maps: Maps) -> Maps:
        return [fused.pack(maps[:count]), in_compute_dtype(fused.pack(maps[count:]))]

    def decode(inputs: Maps) -> Maps:
        return [y for t in inputs for y in fused.unpack_rows(t, s.levels, n)]

    def bar(convs: Any, inputs: Maps) -> Maps:
        return dense_branches(inputs[:count], [(conv.weight, conv.bias) for conv in convs])

    run_reference = _layered_branches(_reference_conv)
    pixels, out_pixels = n * s.pixels, n * pixels_of(sizes)
    return Problem(
        setting,
        [*random_maps(shapes, n, 4), *between_pixels(random_maps(predicted, n, 12))],
        module,
        reference_of(run_reference),
        [
            ours(
                own,
                inputs=Layout(encode, decode),
                outputs=rows_of(sizes, n),
            ),
            reference_of(run_reference),
            *on_each_operator(_layered_branches),
            dense(bar),
        ],
        Work(
            conv_flops(out_pixels, s.channels, s.channels),
            pixels * (s.channels + 3 * TAPS) + parameter_count(module),
            out_pixels * s.channels,
        ),
    )


def _layered_branches(operator: peers.DeformConv) -> Run:
    """The branches of each level one by one, of the levels and then their predictions."""

    def run(convs: Any, inputs: Maps) -> Maps:
        features, predictions = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]
        offsets = [p[:, :OFFSET_CHANNELS].contiguous() for p in predictions]
        masks = [p[:, OFFSET_CHANNELS:].sigmoid() for p in predictions]
        weights = [(conv.weight, conv.bias) for conv in convs]
        per_level = peers.deform_branches(features, offsets, masks, weights, operator)
        return [y for level in per_level for y in level]

    return run


def _reference_conv(
    x: Tensor, offset: Tensor, mask: Tensor, w: Tensor, b: Tensor | None, stride: int
) -> Tensor:
    return reference.modulated_deform_conv2d(x, offset, w, b, stride, 1, 1, mask)


def dense_branches(features: Maps, weights: Sequence[tuple[Tensor, Tensor | None]]) -> Maps:
    """Plain convolutions at the places of a block's deformable ones."""
    low, mid, high = weights
    outputs = []
    for level, x in enumerate(features):
        outputs.append(F.conv2d(x, *mid, padding=1))
        if level > 0:
            outputs.append(F.conv2d(features[level - 1], *low, padding=1, stride=2))
        if level + 1 < len(features):
            outputs.append(F.conv2d(features[level + 1], *high, padding=1))
    return outputs


class _CoefficientParameters(nn.Module):
    """The parameters that a block has between its two passes."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(num_groups, channels) for _ in range(3))
        self.gate = nn.Linear(channels, 1)
        self.relu = DynamicReLU(channels)


def block_coefficients(setting: Setting) -> Problem:
    """A block's step between its passes: normalisation, gates and ReLU coefficients of moments."""
    s, n = setting.shapes, setting.batch
    plan = fused.block_plan(s.levels, n, "flat")
    jobs, levels = len(plan.branches), len(s.levels)
    mean, var, up_mean = (random_maps([(s.channels,)] * jobs, n, seed) for seed in (13, 14, 15))
    module = randomised(_CoefficientParameters(s.channels, s.num_groups))

    def own(p: Any, inputs: Maps) -> Maps:
        mean, var, up_mean = inputs
        return list(
            run_block_coefficients(
                mean,
                var,
                up_mean,
                [norm.weight for norm in p.norms],
                [norm.bias for norm in p.norms],
                p.gate.weight[0],
                p.gate.bias,
                *relu_parameters(p.relu),
                plan.job_levels,
                plan.job_branches,
                num_groups=s.num_groups,
                eps=p.norms[0].eps,
            )
        )

    def layers(p: Any, inputs: Maps) -> Maps:
        return _layered_coefficients(p, inputs, plan.job_branches, branch_counts(s.levels))

    def encode(maps: Maps) -> Maps:
        return [in_compute_dtype(t) for t in _stacked(maps, [jobs] * 3)]

    values, results = n * jobs * s.channels, n * levels * s.channels
    return Problem(
        setting,
        [*mean, *(0.25 + x.abs() for x in var), *up_mean],
        module,
        reference_of(layers),
        [
            ours(
                own,
                inputs=Layout(encode, _unstacked),
                outputs=Layout(lambda maps: _stacked(maps, (jobs, levels, levels)), _unstacked),
            ),
            Implementation("layer by layer", "layers", layers),
        ],
        Work(
            relu_flops(n * levels, s.channels),
            3 * values + parameter_count(module),
            values + 5 * results,
        ),
    )


def _layered_coefficients(
    p: Any, inputs: Maps, job_branches: Sequence[int], counts: Sequence[int]
) -> Maps:
    """Level by level what each branch is scaled by, then all shifts and ReLU coefficients.

    Args:
        p: the parameters.
        inputs: mean, variance and mean after upsampling of each branch map.
        job_branches: low, mid or high of each branch map.
        counts: branch maps of each level.
    """
    jobs = len(job_branches)
    norms = [p.norms[branch] for branch in job_branches]
    moments = list(zip(inputs[:jobs], inputs[jobs : 2 * jobs], inputs[2 * jobs :], strict=True))
    scales, shifts, coefficients = [], [], []
    for count in counts:
        scale, shift, relu = peers.block_coefficients(
            moments[:count], norms[:count], p.gate, relu_parameters(p.relu)
        )
        scales += scale
        shifts.append(shift)
        coefficients.append(relu)
        moments, norms = moments[count:], norms[count:]
    return [*scales, *shifts, *coefficients]


def fuse_branches(setting: Setting) -> Problem:
    """A block's last pass over the pixels: scaled sum of the upsampled branches, dynamic ReLU."""
    s, n = setting.shapes, setting.batch
    plan = fused.block_plan(s.levels, n, "flat")
    sizes, counts = branch_sizes(s.levels), branch_counts(s.levels)
    jobs, levels = len(sizes), len(counts)
    vectors = [(s.channels,)] * (jobs + levels) + [(4, s.channels)] * levels
    images = random_maps([*((s.channels, *size) for size in sizes), *vectors], n, 5)

    def own(_: nn.Module, inputs: Maps) -> Maps:
        y, scale, shift, coefficients = inputs
        return [run_fuse_branches(y, scale, shift, coefficients, n, plan.branches, plan.levels)]

    def encode(maps: Maps) -> Maps:
        ends = (0, jobs, 2 * jobs, 2 * jobs + levels, 2 * (jobs + levels))
        y, *rest = (maps[a:b] for a, b in pairwise(ends))
        return [fused.pack(y), *(in_compute_dtype(torch.stack(group)) for group in rest)]

    def decode(inputs: Maps) -> Maps:
        y, *rest = inputs
        return [*fused.unpack_rows(y, sizes, n), *(t for group in rest for t in group.unbind())]

    def arguments(inputs: Maps) -> tuple[list[Maps], list[Maps], Maps, Maps]:
        y, scale = _grouped(inputs[:jobs], counts), _grouped(inputs[jobs : 2 * jobs], counts)
        return y, scale, inputs[2 * jobs : -levels], inputs[-levels:]

    def layers(_: nn.Module, inputs: Maps) -> Maps:
        return peers.fuse_branches(*arguments(inputs))

    def layers_compiled(_: nn.Module, inputs: Maps) -> Maps:
        found: Maps = compiled(peers.fuse_branches)(*arguments(inputs))
        return found

    return Problem(
        setting,
        images,
        nn.Module(),
        reference_of(layers),
        [
            ours(
                own,
                inputs=Layout(encode, decode),
                outputs=rows_of(s.levels, n),
            ),
            *layers_and_compiled(layers, layers_compiled),
        ],
        Work(0, sum(x.numel() for x in images), n * s.pixels * s.channels),
    )


def _stacked(maps: Maps, counts: Sequence[int]) -> Maps:
    return [torch.stack(group) for group in _grouped(maps, counts)]


def _unstacked(stacks: Maps) -> Maps:
    return [t for stack in stacks for t in stack.unbind()]


def _grouped(maps: Maps, counts: Sequence[int]) -> list[Maps]:
    rest = iter(maps)
    return [[next(rest) for _ in range(count)] for count in counts]

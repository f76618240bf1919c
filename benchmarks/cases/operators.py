"""The cases that are one operator: its problem at one size, its peers and its work."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import peers
from benchmarks.cases.precisions import BLOCK_GRADIENT_TOLERANCE, BLOCK_TOLERANCE
from benchmarks.cases.problems import (
    NCHW,
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
from dyhead_cuda import functional, fused, ops, reference
from dyhead_cuda.modules import DynamicReLU, ModulatedDeformConv2d, UnifiedDyHeadBlock
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.pyramid import OFFSET_CHANNELS, TAPS

Size = tuple[int, int]


def conv_flops(pixels: int, in_channels: int, out_channels: int) -> int:
    """Of a 3x3 convolution at that many output pixels, deformable or not."""
    return 2 * TAPS * in_channels * out_channels * pixels


def relu_flops(images: int, channels: int, reduction: int = 4) -> int:
    """Of the two fully connected layers of the dynamic ReLU."""
    hidden = max(1, channels // reduction)
    return 2 * images * (channels * hidden + hidden * 4 * channels)


def pixels_of(sizes: Sequence[Size]) -> int:
    return sum(height * width for height, width in sizes)


def branch_sizes(levels: Sequence[Size]) -> list[Size]:
    """Sizes of a block's branch maps: per level mid, low and high, as far as it has them."""
    sizes = []
    for level, size in enumerate(levels):
        sizes += [size] + [size] * (level > 0) + list(levels[level + 1 : level + 2])
    return sizes


def branch_counts(levels: Sequence[Size]) -> list[int]:
    """The number of branches of each level."""
    return [1 + (i > 0) + (i + 1 < len(levels)) for i in range(len(levels))]


def _rows(sizes: Sequence[Size], images: int) -> Layout:
    """One matrix of rows."""
    return Layout(
        lambda maps: [fused.pack(maps)], lambda rows: fused.unpack_rows(rows[0], sizes, images)
    )


def _between_pixels(maps: Maps) -> Maps:
    """Offsets that are no whole numbers: there, where gradients jump, every code has its own."""
    return [torch.where(x == x.round(), x + 0.5, x) for x in maps]


def _wide(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t.dtype))


def pack_levels(setting: Setting) -> Problem:
    """Bringing a pyramid of NCHW maps into one matrix of rows."""
    s, n = setting.shapes, setting.batch

    def own(_: nn.Module, levels: Maps) -> Maps:
        return [ops.pack_levels(levels)]

    def layers(_: nn.Module, levels: Maps) -> Maps:
        return [torch.cat([x.permute(0, 2, 3, 1).reshape(-1, s.channels) for x in levels])]

    rows = _rows(s.levels, n)
    values = n * s.pixels * s.channels
    return Problem(
        setting,
        random_maps([(s.channels, *size) for size in s.levels], n, 16),
        nn.Module(),
        Implementation("reference", "reference", layers, outputs=rows),
        [
            ours(own, inputs=NCHW, outputs=rows),
            Implementation("layer by layer", "layers", layers, outputs=rows),
        ],
        Work(0, values, values),
    )


def offset_conv(setting: Setting) -> Problem:
    """The 3x3 convolution that predicts offsets and mask, on all levels."""
    s, n = setting.shapes, setting.batch
    plan = fused.block_plan(s.levels, n, "flat").predict
    module = randomised(nn.Conv2d(s.channels, 3 * TAPS, 3, padding=1))

    def own(conv: nn.Conv2d, rows: Maps) -> Maps:
        return [fused.predict(rows[0], conv.weight, conv.bias, plan)]

    def per_level(conv: nn.Conv2d, levels: Maps) -> Maps:
        return [conv(x) for x in levels]

    return Problem(
        setting,
        random_maps([(s.channels, *size) for size in s.levels], n, 1),
        module,
        reference_of(per_level),
        [
            ours(
                own,
                inputs=_rows(s.levels, n),
                outputs=_rows(s.levels, n),
            ),
            Implementation("layer by layer", "layers", per_level),
            dense(per_level),
        ],
        Work(
            conv_flops(n * s.pixels, s.channels, 3 * TAPS),
            n * s.pixels * s.channels + parameter_count(module),
            n * s.pixels * 3 * TAPS,
        ),
    )


def deform_conv(setting: Setting) -> Problem:
    """One modulated deformable convolution on the finest level, through the public function."""
    s, n = setting.shapes, setting.batch
    size = s.levels[0]
    (x,) = random_maps([(s.channels, *size)], n, 2)
    (offset,) = _between_pixels(random_maps([(OFFSET_CHANNELS, *size)], n, 11))
    mask = torch.sigmoid(random_maps([(TAPS, *size)], n, 3)[0]).to(torch.bfloat16).float()
    module = randomised(ModulatedDeformConv2d(s.channels, s.channels, 3, padding=1))

    def own(conv: ModulatedDeformConv2d, inputs: Maps) -> Maps:
        return [conv(*inputs)]

    def with_operator(operator: peers.DeformConv) -> Run:
        def run(conv: ModulatedDeformConv2d, inputs: Maps) -> Maps:
            x, offset, mask = inputs
            return [operator(x, offset, mask, conv.weight, conv.bias, 1)]

        return run

    def bar(conv: ModulatedDeformConv2d, inputs: Maps) -> Maps:
        return [F.conv2d(inputs[0], conv.weight, conv.bias, padding=1)]

    pixels = n * pixels_of([size])
    return Problem(
        setting,
        [x, offset, mask],
        module,
        reference_of(own),
        [ours(own), reference_of(own), *on_each_operator(with_operator), dense(bar)],
        Work(
            conv_flops(pixels, s.channels, s.channels),
            pixels * (s.channels + 3 * TAPS) + parameter_count(module),
            pixels * s.channels,
        ),
    )


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
        return [ops.deform_conv(rows, predictions, weights, plan.deform, biases, moments=True)[0]]

    def encode(maps: Maps) -> Maps:
        return [fused.pack(maps[:count]), _wide(fused.pack(maps[count:]))]

    def decode(inputs: Maps) -> Maps:
        return [y for t in inputs for y in fused.unpack_rows(t, s.levels, n)]

    def with_operator(operator: peers.DeformConv) -> Run:
        def run(convs: Any, inputs: Maps) -> Maps:
            features, predictions = inputs[:count], inputs[count:]
            offsets = [p[:, :OFFSET_CHANNELS].contiguous() for p in predictions]
            masks = [p[:, OFFSET_CHANNELS:].sigmoid() for p in predictions]
            weights = [(conv.weight, conv.bias) for conv in convs]
            per_level = peers.deform_branches(features, offsets, masks, weights, operator)
            return [y for level in per_level for y in level]

        return run

    def judge(x: Tensor, offset: Tensor, mask: Tensor, w: Tensor, b: Any, stride: int) -> Tensor:
        return reference.modulated_deform_conv2d(x, offset, w, b, stride, 1, 1, mask)

    def bar(convs: Any, inputs: Maps) -> Maps:
        return dense_branches(inputs[:count], [(conv.weight, conv.bias) for conv in convs])

    run_reference = with_operator(judge)
    pixels, out_pixels = n * s.pixels, n * pixels_of(sizes)
    return Problem(
        setting,
        [*random_maps(shapes, n, 4), *_between_pixels(random_maps(predicted, n, 12))],
        module,
        reference_of(run_reference),
        [
            ours(
                own,
                inputs=Layout(encode, decode),
                outputs=_rows(sizes, n),
            ),
            reference_of(run_reference),
            *on_each_operator(with_operator),
            dense(bar),
        ],
        Work(
            conv_flops(out_pixels, s.channels, s.channels),
            pixels * (s.channels + 3 * TAPS) + parameter_count(module),
            out_pixels * s.channels,
        ),
    )


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
            ops.block_coefficients(
                mean,
                var,
                up_mean,
                [norm.weight for norm in p.norms],
                [norm.bias for norm in p.norms],
                p.gate.weight[0],
                p.gate.bias,
                *_relu_parameters(p.relu),
                plan.levels_of,
                plan.branches_of,
                num_groups=s.num_groups,
                eps=p.norms[0].eps,
            )
        )

    def layers(p: Any, inputs: Maps) -> Maps:
        norms = [p.norms[branch] for branch in plan.branches_of]
        counts = branch_counts(s.levels)
        moments = list(zip(inputs[:jobs], inputs[jobs : 2 * jobs], inputs[2 * jobs :], strict=True))
        scales, shifts, coefficients = [], [], []
        for count in counts:
            scale, shift, relu = peers.block_coefficients(
                moments[:count], norms[:count], p.gate, _relu_parameters(p.relu)
            )
            scales += scale
            shifts.append(shift)
            coefficients.append(relu)
            moments, norms = moments[count:], norms[count:]
        return [*scales, *shifts, *coefficients]

    def stacked(maps: Maps, counts: Sequence[int]) -> Maps:
        return [torch.stack(group) for group in _grouped(maps, counts)]

    def apart(stacks: Maps) -> Maps:
        return [t for stack in stacks for t in stack.unbind()]

    values, results = n * jobs * s.channels, n * levels * s.channels
    return Problem(
        setting,
        [*mean, *(0.25 + x.abs() for x in var), *up_mean],
        module,
        reference_of(layers),
        [
            ours(
                own,
                inputs=Layout(lambda maps: [_wide(t) for t in stacked(maps, [jobs] * 3)], apart),
                outputs=Layout(lambda maps: stacked(maps, (jobs, levels, levels)), apart),
            ),
            Implementation("layer by layer", "layers", layers),
        ],
        Work(
            relu_flops(n * levels, s.channels),
            3 * values + parameter_count(module),
            values + 5 * results,
        ),
    )


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
        return [ops.fuse_branches(y, scale, shift, coefficients, n, plan.branches, plan.levels)]

    def encode(maps: Maps) -> Maps:
        ends = (0, jobs, 2 * jobs, 2 * jobs + levels, 2 * (jobs + levels))
        y, *rest = (maps[a:b] for a, b in pairwise(ends))
        return [fused.pack(y), *(_wide(torch.stack(group)) for group in rest)]

    def decode(inputs: Maps) -> Maps:
        y, *rest = inputs
        return [*fused.unpack_rows(y, sizes, n), *(t for group in rest for t in group.unbind())]

    def layers(_: nn.Module, inputs: Maps) -> Maps:
        y, scale = _grouped(inputs[:jobs], counts), _grouped(inputs[jobs : 2 * jobs], counts)
        shift, coefficients = inputs[2 * jobs : -levels], inputs[-levels:]
        return peers.fuse_branches(y, scale, shift, coefficients)

    def layers_compiled(_: nn.Module, inputs: Maps) -> Maps:
        y, scale = _grouped(inputs[:jobs], counts), _grouped(inputs[jobs : 2 * jobs], counts)
        shift, coefficients = inputs[2 * jobs : -levels], inputs[-levels:]
        return compiled(peers.fuse_branches)(y, scale, shift, coefficients)

    return Problem(
        setting,
        images,
        nn.Module(),
        reference_of(layers),
        [
            ours(
                own,
                inputs=Layout(encode, decode),
                outputs=_rows(s.levels, n),
            ),
            *_layers_and_compiled(layers, layers_compiled),
        ],
        Work(0, sum(x.numel() for x in images), n * s.pixels * s.channels),
    )


def _layers_and_compiled(layers: Run, layers_compiled: Run) -> list[Implementation]:
    name = "layer by layer"
    return [
        Implementation(name, "layers", layers),
        Implementation(f"{name}, torch.compile", "compile", layers_compiled, compiled=True),
    ]


def _grouped(maps: Maps, counts: Sequence[int]) -> list[Maps]:
    rest = iter(maps)
    return [[next(rest) for _ in range(count)] for count in counts]


def _relu_parameters(relu: DynamicReLU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return relu.fc1.weight, relu.fc1.bias, relu.fc2.weight, relu.fc2.bias


def dynamic_relu(setting: Setting) -> Problem:
    """The task attention on the finest level, through the public function."""
    s, n = setting.shapes, setting.batch
    size = s.levels[0]
    module = randomised(DynamicReLU(s.channels))

    def own(relu: DynamicReLU, inputs: Maps) -> Maps:
        return [relu(inputs[0])]

    def layers(relu: DynamicReLU, inputs: Maps) -> Maps:
        return [peers.dynamic_relu(inputs[0], *_relu_parameters(relu))]

    def layers_compiled(relu: DynamicReLU, inputs: Maps) -> Maps:
        return [compiled(peers.dynamic_relu)(inputs[0], *_relu_parameters(relu))]

    values = n * s.channels * pixels_of([size])
    return Problem(
        setting,
        random_maps([(s.channels, *size)], n, 6),
        module,
        reference_of(own),
        [ours(own), reference_of(own), *_layers_and_compiled(layers, layers_compiled)],
        Work(relu_flops(n, s.channels), values + parameter_count(module), values),
    )


class _SpatialAttention(nn.Module):
    """The parameters that pi_S of the paper has."""

    def __init__(self, levels: int, channels: int) -> None:
        super().__init__()
        block = UnifiedDyHeadBlock(levels, channels)
        self.weight, self.offset_conv = block.spatial_weight, block.offset_conv


def spatial_attention(setting: Setting) -> Problem:
    """The paper's formula as printed: all levels, at the median level's size, into one map."""
    s, n = setting.shapes, setting.batch
    levels = len(s.levels)
    size = s.levels[levels // 2]
    module = randomised(_SpatialAttention(levels, s.channels))

    def own(p: Any, inputs: Maps) -> Maps:
        conv = p.offset_conv
        return [
            functional.spatial_attention(
                inputs[0], p.weight, conv.weight, conv.bias, targets="median"
            )
        ]

    def with_operator(operator: peers.DeformConv) -> Run:
        def run(p: Any, inputs: Maps) -> Maps:
            conv = p.offset_conv
            arguments = inputs[0], p.weight, conv.weight, conv.bias
            return [peers.spatial_attention(*arguments, "median", operator)]

        return run

    def bar(p: Any, inputs: Maps) -> Maps:
        conv = p.offset_conv
        aggregated = [
            F.conv2d(x, w, padding=1) for x, w in zip(inputs[0].unbind(1), p.weight, strict=True)
        ]
        return [*aggregated, conv(inputs[0][:, levels // 2])]

    pixels = n * pixels_of([size])
    return Problem(
        setting,
        random_maps([(levels, s.channels, *size)], n, 8),
        module,
        reference_of(own),
        [ours(own), reference_of(own), *on_each_operator(with_operator), dense(bar)],
        Work(
            levels * conv_flops(pixels, s.channels, s.channels)
            + conv_flops(pixels, s.channels, 3 * TAPS),
            levels * pixels * s.channels + parameter_count(module),
            pixels * s.channels,
        ),
        tolerance=BLOCK_TOLERANCE,  # offsets are computed here, too
        gradient_tolerance=BLOCK_GRADIENT_TOLERANCE,
        jumps=0.05,
    )

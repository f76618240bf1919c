"""The cases that are one operator: its problem at one size, its peers and its work."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import peers
from benchmarks.cases.common import (
    between_pixels,
    conv_flops,
    layers_and_compiled,
    pixels_of,
    relu_flops,
    relu_parameters,
    rows_of,
)
from benchmarks.cases.precisions import BLOCK_GRADIENT_TOLERANCE, BLOCK_TOLERANCE
from benchmarks.cases.problems import (
    NCHW,
    Implementation,
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
from dyhead_cuda import functional, fused
from dyhead_cuda.modules import DynamicReLU, ModulatedDeformConv2d, UnifiedDyHeadBlock
from dyhead_cuda.ops.pack_levels import pack_levels as run_pack_levels
from dyhead_cuda.pyramid import OFFSET_CHANNELS, TAPS


def pack_levels(setting: Setting) -> Problem:
    """Bringing a pyramid of NCHW maps into one matrix of rows."""
    s, n = setting.shapes, setting.batch

    def own(_: nn.Module, levels: Maps) -> Maps:
        return [run_pack_levels(levels)]

    def layers(_: nn.Module, levels: Maps) -> Maps:
        return [torch.cat([x.permute(0, 2, 3, 1).reshape(-1, s.channels) for x in levels])]

    rows = rows_of(s.levels, n)
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
    plan = fused.predict_plan(s.levels, n)
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
                inputs=rows_of(s.levels, n),
                outputs=rows_of(s.levels, n),
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
    (offset,) = between_pixels(random_maps([(OFFSET_CHANNELS, *size)], n, 11))
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


def dynamic_relu(setting: Setting) -> Problem:
    """The task attention on the finest level, through the public function."""
    s, n = setting.shapes, setting.batch
    size = s.levels[0]
    module = randomised(DynamicReLU(s.channels))

    def own(relu: DynamicReLU, inputs: Maps) -> Maps:
        return [relu(inputs[0])]

    def layers(relu: DynamicReLU, inputs: Maps) -> Maps:
        return [peers.dynamic_relu(inputs[0], *relu_parameters(relu))]

    def layers_compiled(relu: DynamicReLU, inputs: Maps) -> Maps:
        return [compiled(peers.dynamic_relu)(inputs[0], *relu_parameters(relu))]

    values = n * s.channels * pixels_of([size])
    return Problem(
        setting,
        random_maps([(s.channels, *size)], n, 6),
        module,
        reference_of(own),
        [ours(own), reference_of(own), *layers_and_compiled(layers, layers_compiled)],
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
        tolerance=BLOCK_TOLERANCE,  # the offsets are computed here too
        gradient_tolerance=BLOCK_GRADIENT_TOLERANCE,
        jumps=0.05,
    )

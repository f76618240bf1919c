"""The cases that are a block or a whole head, and the registry of all cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import block_steps, operators, peers
from benchmarks.cases.common import branch_sizes, conv_flops, pixels_of, relu_flops
from benchmarks.cases.precisions import BLOCK_GRADIENT_TOLERANCE, BLOCK_TOLERANCE
from benchmarks.cases.problems import (
    BOTH,
    NCHW,
    OURS,
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
from dyhead_cuda.modules import DyHead, UnifiedDyHead
from dyhead_cuda.pyramid import TAPS, BlockParameters

RECOMPUTE = f"{OURS}, recompute=True"


@cache
def published_block(
    operator: peers.DeformConv, num_groups: int
) -> Callable[[list[Tensor], BlockParameters], list[Tensor]]:
    """The layers on one operator; the same object each time, so that it is compiled once."""

    def block(features: list[Tensor], parameters: BlockParameters) -> list[Tensor]:
        return peers.published_block(features, parameters, operator, num_groups)

    return block


def block_work(setting: Setting) -> Work:
    """The work of one block on all levels."""
    s, n = setting.shapes, setting.batch
    c, pixels = s.channels, n * s.pixels
    branch_pixels = n * pixels_of(branch_sizes(s.levels))
    products = (
        conv_flops(pixels, c, 3 * TAPS)
        + conv_flops(branch_pixels, c, c)
        + relu_flops(n * len(s.levels), c)
    )
    parameters = parameter_count(DyHead(c, c, 1, num_groups=s.num_groups))
    return Work(products, pixels * c + parameters, pixels * c)


def _stack(blocks: int, work: Work) -> Work:
    total = work
    for _ in range(blocks - 1):
        total = total + work
    return total


def _run(head: Any, inputs: Maps) -> Maps:
    return list(head(inputs))


def _block_by_block(head: Any, inputs: Maps) -> Maps:
    # A float64 block keeps a lot for its backward: keep it for one block at a time.
    for block in head.blocks:
        inputs = checkpoint(block, inputs, use_reentrant=False)
    return list(inputs)


def head(setting: Setting) -> Problem:
    """The published head on a pyramid, one block after the other."""
    s, n = setting.shapes, setting.batch
    arguments = (s.channels, s.channels, setting.blocks)
    module = randomised(DyHead(*arguments, num_groups=s.num_groups))

    def recomputing(template: nn.Module) -> nn.Module:
        made = DyHead(*arguments, num_groups=s.num_groups, recompute=True).requires_grad_(False)
        made.load_state_dict(template.state_dict())
        return made

    def layers(operator: peers.DeformConv) -> Run:
        return _layered_head(published_block(operator, s.num_groups))

    # Inputs are NCHW, as a feature pyramid network returns them; packing them is part of our time.
    implementations = [ours(_run, inputs=NCHW)]
    if setting.blocks > 1:  # recomputing a single block saves nothing
        recompute = ours(_run, RECOMPUTE, inputs=NCHW, adapt=recomputing, directions=(BOTH,))
        implementations.append(recompute)
    implementations += [reference_of(_run), *on_each_operator(layers)]
    operator = peers.deform_convs().get("torchvision")
    if operator is not None:
        implementations.append(
            Implementation(
                "torchvision, torch.compile",
                "compile",
                _layered_head(published_block(operator, s.num_groups), compile_it=True),
                operator="torchvision",
                compiled=True,
            )
        )
    return Problem(
        setting,
        random_maps([(s.channels, *size) for size in s.levels], n, 9),
        module,
        reference_of(_block_by_block),
        [*implementations, dense(_dense_head)],
        _stack(setting.blocks, block_work(setting)),
        tolerance=BLOCK_TOLERANCE,
        gradient_tolerance=BLOCK_GRADIENT_TOLERANCE,
        jumps=0.05,
    )


def _layered_head(block: Callable[..., Maps], compile_it: bool = False) -> Run:
    """A head whose blocks are ``block``."""

    def run(head: Any, features: Maps) -> Maps:
        function = compiled(block) if compile_it else block
        for member in head.blocks:
            features = function(features, member.parameters_tuple())
        return features

    return run


def _dense_head(head: Any, features: Maps) -> Maps:
    outputs: Maps = []
    for block in head.blocks:
        weights = [(b.weight, b.bias) for b in (block.low, block.mid, block.high)]
        outputs += block_steps.dense_branches(features, weights)
        outputs += [block.offset_conv(x) for x in features]
    return outputs


def unified(setting: Setting) -> Problem:
    """The paper's head on one tensor [N, L, C, H, W] at the median level's size."""
    s, n = setting.shapes, setting.batch
    levels = len(s.levels)
    size = s.levels[levels // 2]
    module = randomised(UnifiedDyHead(levels, s.channels, setting.blocks))

    def own(head: Any, inputs: Maps) -> Maps:
        return [head(inputs[0])]

    pixels = n * pixels_of([size])
    block = Work(
        levels * levels * conv_flops(pixels, s.channels, s.channels)
        + levels * conv_flops(pixels, s.channels, 3 * TAPS)
        + relu_flops(n, s.channels),
        levels * pixels * s.channels + parameter_count(module) // setting.blocks,
        levels * pixels * s.channels,
    )
    return Problem(
        setting,
        random_maps([(levels, s.channels, *size)], n, 10),
        module,
        reference_of(_unified_by_block),
        [ours(own), reference_of(own), *on_each_operator(_layered_unified), dense(_dense_unified)],
        _stack(setting.blocks, block),
        tolerance=BLOCK_TOLERANCE,
        gradient_tolerance=BLOCK_GRADIENT_TOLERANCE,
        jumps=0.05,
    )


def _unified_by_block(head: Any, inputs: Maps) -> Maps:
    x = inputs[0]
    for block in head.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return [x]


def _layered_unified(operator: peers.DeformConv) -> Run:
    def run(head: Any, inputs: Maps) -> Maps:
        x = inputs[0]
        for block in head.blocks:
            x = peers.unified_block(x, block.parameters_tuple(), operator)
        return [x]

    return run


def _dense_unified(head: Any, inputs: Maps) -> Maps:
    x = inputs[0].flatten(0, 1)
    outputs = []
    for block in head.blocks:
        # Every target level reads every level.
        outputs += [torch.conv2d(x, w, padding=1) for w in block.spatial_weight]
        outputs.append(block.offset_conv(x))
    return outputs


# "block" is the head with one block.
CASES: dict[str, Callable[[Setting], Problem]] = {
    "block": head,
    "head": head,
    "unified": unified,
    "pack_levels": operators.pack_levels,
    "branches": block_steps.branches,
    "deform_conv": operators.deform_conv,
    "block_coefficients": block_steps.block_coefficients,
    "fuse_branches": block_steps.fuse_branches,
    "offset_conv": operators.offset_conv,
    "dynamic_relu": operators.dynamic_relu,
    "spatial_attention": operators.spatial_attention,
}
STACKED = ("head", "unified")  # cases whose number of blocks can be chosen


def problem_of(setting: Setting) -> Problem:
    """The problem of a setting; the same data and parameters at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[setting.case](setting)

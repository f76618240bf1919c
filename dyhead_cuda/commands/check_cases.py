"""What ``python -m dyhead_cuda check`` runs: operators and heads, with inputs away from kinks.

A result is continuous everywhere, but its gradient jumps where a sample crosses a pixel's border,
and where another line of the dynamic ReLU becomes the larger one. Correct kernels differ there, so
the gradients are compared where nothing is near such a place: offsets are multiples of a quarter
pixel, exact in every type, and the lines are far apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm

from dyhead_cuda import DyHead, UnifiedDyHead, functional, reference
from dyhead_cuda.numerics import resize
from dyhead_cuda.ops.block_coefficients import block_coefficients
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.fuse_branches import fuse_branches
from dyhead_cuda.ops.jobs import Job, Plan, ReadRule
from dyhead_cuda.ops.offset_deform_conv import offset_deform_conv
from dyhead_cuda.ops.pack_levels import pack_levels, unpack_levels
from dyhead_cuda.pyramid import HighOffset

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a case: by default of more pixels than a tile of the CUDA kernels has."""

    images: int = 2
    channels: int = 64
    groups: int = 8
    hidden: int = 16
    sizes: tuple[tuple[int, int], ...] = ((17, 20), (9, 10), (5, 5))

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """Of one level: one of its size, and one of the coarser level's."""
        return self.sizes[:2]


USUAL = Shape()
# For gradcheck, which computes the results twice for every element of the inputs.
SMALL = Shape(images=1, channels=4, groups=2, hidden=3, sizes=((3, 4), (2, 2)))


@dataclass(frozen=True)
class Case:
    """Something to run, in two ways.

    Args:
        name: of the row.
        tensors: the inputs in float64 on the CPU, by whether they must be away from kinks.
        compiled: the results, on whatever the inputs are.
        expected: the same in plain PyTorch; by default ``compiled`` under the reference backend.
        factor: how many times the tolerance of one operator the results may have.
        floor: what share of the largest gradient's norm a gradient's error is at least divided by.
        precise: inputs that are of the accumulation type, by index.
        deterministic: whether to ask torch for deterministic algorithms.
    """

    name: str
    tensors: Callable[[bool], list[Tensor]]
    compiled: Function
    expected: Function | None = None
    factor: float = 1
    floor: float = 1e-3
    precise: Sequence[int] = ()
    deterministic: bool = False

    def inputs(self, smooth: bool, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Leaves that ask for gradients."""
        precise = compute_dtype(dtype)
        return [
            t.to(device, precise if i in self.precise else dtype).requires_grad_()
            for i, t in enumerate(self.tensors(smooth))
        ]


def normals(seed: int = 0) -> Callable[..., Tensor]:
    """A function from sizes to normal values in float64."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return normal


def quarters(values: Tensor) -> Tensor:
    """Values moved to 1/4, 1/2 or 3/4 above a whole number, which every floating type has."""
    whole = values.floor()
    return whole + ((values - whole) * 3).floor() / 4 + 0.25


def keep_lines_apart(fc2_weight: Tensor, fc2_bias: Tensor) -> None:
    """Makes the first line of a dynamic ReLU larger, by parameters that differ little by image."""
    channels = fc2_bias.shape[0] // 4
    with torch.no_grad():
        fc2_weight.mul_(0.01)
        t = torch.tensor([-0.5, 0.5, 0.5, -0.5]).repeat_interleave(channels)
        fc2_bias.copy_(3 * t)


def random_parameters(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Values in float64 for the parameters of any module, by name, of which none is constant."""
    normal, values = normals(seed), {}
    for name, p in module.named_parameters():
        fan_in = max(1, p[0].numel()) if p.dim() > 1 else 4
        # Around one: the norm's weight, and the bias that keeps the gate's ReLU alive.
        around = 1.0 if name.endswith(("norm.weight", "scale_gate.bias")) else 0.0
        values[name] = normal(*p.shape) / math.sqrt(fan_in) + around
    return values


def _relu_parameters(shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
    return [
        normal(shape.hidden, shape.channels) / math.sqrt(shape.channels),
        normal(shape.hidden) + 0.5,
        normal(4 * shape.channels, shape.hidden) / math.sqrt(shape.hidden),
        2 * normal(4 * shape.channels),
    ]


# --- operators ----------------------------------------------------------------------------------


def _pyramid(shape: Shape, _: bool = False) -> list[Tensor]:
    normal = normals()
    return [normal(shape.images, shape.channels, *size) for size in shape.sizes]


def _packed(shape: Shape, levels: Sequence[Tensor]) -> list[Tensor]:
    rows = pack_levels(levels)
    return [rows, *unpack_levels(2 * rows, shape.sizes, shape.images)]


def _packed_plainly(shape: Shape, levels: Sequence[Tensor]) -> list[Tensor]:
    rows = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, shape.channels) for x in levels])
    return [rows, *(2 * x for x in levels)]


def _convolution_inputs(shape: Shape, _: bool) -> list[Tensor]:
    normal, (height, width) = normals(1), shape.sizes[0]
    return [
        normal(shape.images, shape.channels, height, width),
        quarters(2 * normal(shape.images, 18, height, width)),
        normal(shape.channels, shape.channels, 3, 3) / math.sqrt(9 * shape.channels),
        normal(shape.channels),
        normal(shape.images, 9, height, width).sigmoid(),
    ]


def _convolution(inputs: Sequence[Tensor]) -> list[Tensor]:
    x, offset, weight, bias, mask = inputs
    return [functional.modulated_deform_conv2d(x, offset, weight, bias, 1, 1, 1, mask)]


def _offset_inputs(shape: Shape, smooth: bool) -> list[Tensor]:
    normal, c = normals(6), shape.channels
    offset_weight = 0.5 * normal(27, c, 3, 3) / math.sqrt(9 * c)
    offset_bias = quarters(2 * normal(27))
    if smooth:  # the biases alone decide where a sample is
        offset_weight[:18] = 0
    return [
        normal(sum(shape.images * h * w for h, w in shape.branches), c),
        offset_weight,
        offset_bias,
        normal(c, c, 3, 3) / math.sqrt(9 * c),
        normal(c, c, 3, 3) / math.sqrt(9 * c),
    ]


def _predicted(shape: Shape, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A level's own branch and that of the coarser level, with predictions of the level."""
    rows, offset_weight, offset_bias, *weights = inputs
    own, coarser = shape.branches
    jobs = [
        Job(own, 0, [(0, 0)]),
        Job(coarser, 0, [(1, 1)], (1, 1), ReadRule.FLAT, ReadRule.FLAT, own),
    ]
    plan = Plan(shape.images, [own, coarser], [own], jobs)
    y, *moments = offset_deform_conv(rows, offset_weight, offset_bias, weights, plan)
    return [y, *(t.to(y.dtype) for t in moments)]


def _predicted_plainly(shape: Shape, inputs: Sequence[Tensor]) -> list[Tensor]:
    rows, offset_weight, offset_bias, *weights = inputs
    levels = _branches_of(shape, rows)
    predictions = conv2d(levels[0], offset_weight, offset_bias, padding=1)
    maps = []
    for x, weight in zip(levels, weights, strict=True):
        # The values of the larger map's memory, as a smaller map.
        height, width = x.shape[2:]
        offset, mask = (
            part.flatten(1)[:, : count * height * width].view(-1, count, height, width)
            for part, count in ((predictions[:, :18], 18), (predictions[:, 18:].sigmoid(), 9))
        )
        maps.append(
            functional.modulated_deform_conv2d(x, offset, weight, None, 1, 1, 1, mask.contiguous())
        )
    moments = [
        [x.mean((2, 3)) for x in maps],
        [x.var((2, 3), correction=0) for x in maps],
        [resize(x, shape.branches[0], "bilinear").mean((2, 3)) for x in maps],
    ]
    y = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, shape.channels) for x in maps])
    return [y, *(torch.stack(values) for values in moments)]


def _relu_inputs(shape: Shape, smooth: bool) -> list[Tensor]:
    normal = normals(2)
    x = normal(shape.images, shape.channels, *shape.sizes[0])
    parameters = _relu_parameters(shape, normal)
    if smooth:
        # The lines 1.5 x and 0.5 x, more or less, cross near 0, where there is no x.
        x = x + 0.1 * x.sign()
        parameters[2] *= 0.01
        parameters[3] = 3 * torch.tensor([0.5, 0, 0.5, 0]).double().repeat_interleave(
            shape.channels
        )
    return [x, *parameters]


def _relu(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [functional.dynamic_relu(*inputs)]


def _fuse_inputs(shape: Shape, smooth: bool) -> list[Tensor]:
    normal = normals(3)
    rows = sum(shape.images * h * w for h, w in shape.branches)
    parameters = [
        *(1 + 0.3 * normal(shape.channels) for _ in shape.branches),
        *(0.5 * normal(shape.channels) for _ in shape.branches),
        normal(shape.channels) / math.sqrt(shape.channels),
        1 + 0.3 * normal(1),
        *_relu_parameters(shape, normal),
    ]
    if smooth:
        keep_lines_apart(*parameters[-2:])
    return [normal(rows, shape.channels), *parameters]


def _branches_of(shape: Shape, y: Tensor) -> list[Tensor]:
    parts = y.split([shape.images * h * w for h, w in shape.branches])
    return [
        part.view(shape.images, h, w, shape.channels).permute(0, 3, 1, 2)
        for part, (h, w) in zip(parts, shape.branches, strict=True)
    ]


def _fused(shape: Shape, inputs: Sequence[Tensor]) -> list[Tensor]:
    y, *parameters = inputs
    maps = [x.to(compute_dtype(y.dtype)) for x in _branches_of(shape, y)]
    mean, var, up_mean = (
        torch.stack(moments)
        for moments in (
            [x.mean((2, 3)) for x in maps],
            [x.var((2, 3), correction=0) for x in maps],
            [resize(x, shape.branches[0], "bilinear").mean((2, 3)) for x in maps],
        )
    )
    count = len(shape.branches)
    branches = list(range(count))
    gate_weight, gate_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters[2 * count :]
    coefficients = block_coefficients(
        mean,
        var,
        up_mean,
        parameters[:count],
        parameters[count : 2 * count],
        gate_weight,
        gate_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        [0] * count,
        branches,
        num_groups=shape.groups,
        eps=1e-3,
    )
    return [
        fuse_branches(
            y, *coefficients, shape.images, shape.branches, [(shape.branches[0], branches)]
        )
    ]


def _fused_plainly(shape: Shape, inputs: Sequence[Tensor]) -> list[Tensor]:
    y, *parameters = inputs
    count = len(shape.branches)
    gate_weight, gate_bias, *task = parameters[2 * count :]
    z = torch.zeros_like(_branches_of(shape, y)[0])
    for i, x in enumerate(_branches_of(shape, y)):
        x = group_norm(x, shape.groups, parameters[i], parameters[count + i], 1e-3)
        x = resize(x, shape.branches[0], "bilinear")
        gate = reference.branch_gate(x, gate_weight, gate_bias)
        z = z + gate.view(-1, 1, 1, 1) * x / count
    out = reference.dynamic_relu(z, task[0], task[1], task[2], task[3])
    return [out.permute(0, 2, 3, 1).reshape(-1, shape.channels)]


# --- heads --------------------------------------------------------------------------------------


def _head_case(name: str, head: nn.Module, features: Callable[[], list[Tensor]]) -> Case:
    """A case whose inputs are features, then the parameters of a head."""
    names = [name for name, _ in head.named_parameters()]
    count = len(features())
    is_pyramid = count > 1

    def tensors(smooth: bool) -> list[Tensor]:
        values = random_parameters(head, seed=5)
        for key in names if smooth else ():
            if key.endswith("offset_conv.weight"):
                values[key].zero_()
            elif key.endswith("offset_conv.bias"):
                values[key] = quarters(4 * values[key])
            elif key.endswith("fc2.weight"):
                keep_lines_apart(values[key], values[key.removesuffix("weight") + "bias"])
        return [*features(), *values.values()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        values = dict(zip(names, inputs[count:], strict=True))
        first = list(inputs[:count]) if is_pyramid else inputs[0]
        out = torch.func.functional_call(head, values, (first,))
        return list(out) if is_pyramid else [out]

    # Two blocks with a rounding to the type between them; gradients of gates are sums that cancel.
    return Case(name, tensors, run, factor=5, floor=0.1)


def _stack(shape: Shape) -> list[Tensor]:
    return [normals(4)(shape.images, 3, shape.channels, *shape.sizes[1])]


def operators(shape: Shape = USUAL) -> list[Case]:
    """A case for each operator; the two that finish a block are one."""

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(function, shape)

    return [
        Case("pack_levels, unpack_levels", of(_pyramid), of(_packed), of(_packed_plainly)),
        Case("deform_conv", of(_convolution_inputs), _convolution, precise=(1, 4)),
        # Two convolutions, one after the other.
        Case(
            "offset_deform_conv",
            of(_offset_inputs),
            of(_predicted),
            of(_predicted_plainly),
            factor=2,
        ),
        Case(
            "block_coefficients, fuse_branches",
            of(_fuse_inputs),
            of(_fused),
            of(_fused_plainly),
            floor=2e-2,
        ),
        Case("dynamic_relu", of(_relu_inputs), _relu, precise=(1, 2, 3, 4)),
    ]


def heads(shape: Shape = USUAL) -> list[Case]:
    """A case for each way in which a head reads its offsets, and the paper's form."""
    c, groups = shape.channels, shape.groups
    return [
        *(
            _head_case(
                f"DyHead, {high_offset}",
                DyHead(c, c, 2, num_groups=groups, high_offset=high_offset),
                partial(_pyramid, shape),
            )
            for high_offset in get_args(HighOffset)
        ),
        _head_case("UnifiedDyHead", UnifiedDyHead(3, c, 2), partial(_stack, shape)),
    ]

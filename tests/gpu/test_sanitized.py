"""What compute-sanitizer watches: few and small, since it makes a test a hundred times slower.

The tests in the other files are for numbers. Here each kernel runs in the ways that differ in what
they read and write: with and without vectors, with tensor cores, on memory that is not aligned,
where nothing is to be read, and in deterministic mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dyhead_cuda import backend, library
from dyhead_cuda.commands import check_cases
from dyhead_cuda.commands.check_cases import Case, Shape
from dyhead_cuda.numerics import gradient_errors
from tests.helpers import coefficients, deform_checks, fuse_cases, packing, relu_checks
from tests.helpers.blocks import Block, check_block
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.deform_work import CONVOLUTIONS, PLAIN, WORKS, Call, Convolution, ManyJobs
from tests.helpers.devices import Device
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.not_finite import CALLS, planted
from tests.helpers.offset_work import WORKS as OFFSET_WORKS
from tests.helpers.training import deterministic

from .device import unaligned

pytestmark = pytest.mark.gpu

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DEVICE: Device = "cuda"


@pytest.fixture(autouse=True)
def _library() -> None:
    library.require(DEVICE)


def convolve(call: Call, dtype: torch.dtype, aligned: bool = True) -> None:
    tensors = call.tensors(dtype, DEVICE)
    if not aligned:
        tensors = {name: unaligned(t) for name, t in tensors.items()}
    deform_checks.check(call, dtype, tensors)


def convolve_deterministically(call: Call, dtype: torch.dtype) -> None:
    with deterministic():
        deform_checks.check(call, dtype, call.tensors(dtype, DEVICE))


def convolve_far_away(call: Convolution, value: float, dtype: torch.dtype) -> None:
    moved = call.displaced(call.tensors(dtype, DEVICE), value)
    deform_checks.check(call, dtype, {name: t.requires_grad_() for name, t in moved.items()})


def convolve_nowhere(dtype: torch.dtype) -> None:
    for call in CALLS.values():
        planted(call, "offset", math.nan, dtype, DEVICE).run()


def coefficients_of(case: coefficients.Case, dtype: torch.dtype, *kinds: torch.dtype) -> None:
    coefficients.check(case, case.tensors(dtype, kinds, DEVICE))


def fuse(case: fuse_cases.Case, dtype: torch.dtype, aligned: bool = True) -> None:
    y, *parameters = case.tensors(dtype, DEVICE)
    fuse_cases.check(case, [y if aligned else unaligned(y), *parameters])


def relu(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool = True) -> None:
    x, *parameters = relu_checks.random_inputs(shape, dtype, device=DEVICE)
    if not aligned:
        x = unaligned(x.transpose(1, 2)).detach().transpose(1, 2).requires_grad_()
    relu_checks.check([x, *parameters])


def pack(dtype: torch.dtype) -> None:
    levels = [x.to(DEVICE) for x in random_pyramid(2, 27, halving_sizes(13, 21, 4), dtype)]
    levels[::2] = [x.contiguous(memory_format=torch.channels_last) for x in levels[::2]]
    packing.check(levels)


def pack_unaligned() -> None:
    (values,) = random_pyramid(2, 16, [(3, 3)], F32)
    x = unaligned(values.to(DEVICE)).detach()
    last = unaligned(values.to(DEVICE).permute(0, 2, 3, 1)).detach().permute(0, 3, 1, 2)
    packing.check([x, x.new_empty(2, 16, 0, 3), last])


def block(dtype: torch.dtype, smooth: bool = False) -> None:
    check_block(Block(in_channels=16, out_channels=24, device=DEVICE), dtype, smooth=smooth)


NARROW = Convolution(channels=7, out_channels=8)
TESTS: dict[str, Callable[[], None]] = {
    "deform_conv float32": partial(convolve, WORKS["all"], F32),
    "deform_conv bfloat16": partial(convolve, WORKS["many channels"], BF16),
    "deform_conv float16, wide output": partial(convolve, CONVOLUTIONS["wide output"], F16),
    "deform_conv float64, groups": partial(
        convolve, CONVOLUTIONS["groups across deformable groups"], F64
    ),
    "deform_conv bfloat16, plain": partial(convolve, PLAIN["predicting"], BF16),
    "deform_conv, several launches": partial(convolve, ManyJobs(), F32),
    "deform_conv, no images": partial(convolve, WORKS["no images"], F32),
    "deform_conv, unaligned": partial(convolve, WORKS["many channels"], BF16, aligned=False),
    "deform_conv, deterministic": partial(convolve_deterministically, WORKS["all"], BF16),
    "offset_deform_conv float32": partial(convolve, OFFSET_WORKS["all"], F32),
    "offset_deform_conv bfloat16": partial(convolve, OFFSET_WORKS["many channels"], BF16),
    "offset_deform_conv, deterministic": partial(
        convolve_deterministically, OFFSET_WORKS["all"], F32
    ),
    "deform_conv, offsets without a place": partial(convolve_nowhere, BF16),
    "deform_conv, offsets beyond int": partial(convolve_far_away, NARROW, 2.0**31, F32),
    "block_coefficients": partial(coefficients_of, coefficients.CASES["odd groups"], F32),
    "block_coefficients, types": partial(
        coefficients_of, coefficients.CASES["three levels"], F32, BF16, F16, F64
    ),
    "block_coefficients, no images": partial(
        coefficients_of, coefficients.block_case(2, images=0), F32
    ),
    "fuse_branches bfloat16": partial(
        fuse, fuse_cases.block_case(halving_sizes(13, 21, 3), channels=64), BF16
    ),
    "fuse_branches, nearest": partial(fuse, fuse_cases.CASES["nearest, odd"], F32),
    "fuse_branches, unaligned": partial(
        fuse, fuse_cases.block_case(halving_sizes(9, 7, 2), channels=64), BF16, aligned=False
    ),
    "fuse_branches, no images": partial(
        fuse, replace(fuse_cases.CASES["two levels"], images=0), F32
    ),
    "dynamic_relu": partial(relu, (2, 3, 5, 7), F32),
    "dynamic_relu, many blocks": partial(relu, (1, 64, 20, 30), BF16),
    "dynamic_relu, unaligned": partial(relu, (2, 64, 70), F16, aligned=False),
    "pack_levels": partial(pack, BF16),
    "pack_levels, unaligned and empty": pack_unaligned,
    "a block float32": partial(block, F32),
    "a block bfloat16": partial(block, BF16, smooth=True),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("run", TESTS.values(), ids=TESTS)
def test_memory(run: Callable[[], None]) -> None:
    run()


# --- initcheck ----------------------------------------------------------------------------------

# Inputs and expectations are computed on the CPU: initcheck watches torch's kernels as well, since
# it takes what an unwatched one wrote for uninitialised, so there should be few of them.
SHAPE = Shape(images=1, channels=24, groups=4, hidden=6, sizes=((9, 10), (5, 5), (3, 3)))
CASES = [*check_cases.operators(SHAPE), check_cases.heads(SHAPE)[0]]


def on_cpu(case: Case, inputs: list[Tensor], cotangents: list[Tensor]) -> list[list[Tensor]]:
    """Results and gradients of the reference in float64."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with backend("reference"):
        outs = list((case.expected or case.compiled)(exact))
    return [outs, list(torch.autograd.grad(outs, exact, cotangents, materialize_grads=True))]


def cotangents_of(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """Normal values in float64, which the type of the inputs can hold."""
    with backend("reference"), torch.no_grad():
        shapes = [t.shape for t in case.compiled([t.double() for t in inputs])]
    return [
        check_cases.normals(i)(*shape).to(inputs[0].dtype).double()
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.initcheck
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nothing_uninitialised_is_read(case: Case) -> None:
    inputs = case.inputs(True, BF16, "cpu")
    cotangents = cotangents_of(case, inputs)
    expected, wanted = on_cpu(case, inputs, cotangents)
    moved = [t.detach().to(DEVICE).requires_grad_() for t in inputs]
    with backend(DEVICE):
        outs = list(case.compiled(moved))
    grad_outs = [g.to(out.dtype).to(DEVICE) for g, out in zip(cotangents, outs, strict=True)]
    grads = torch.autograd.grad(outs, moved, grad_outs, materialize_grads=True)
    assert_close([t.cpu() for t in outs], expected, BF16, case.factor)
    errors = gradient_errors([g.cpu() for g in grads], wanted, case.floor)
    assert max(errors) <= 2 * case.factor * TOLERANCE[BF16]

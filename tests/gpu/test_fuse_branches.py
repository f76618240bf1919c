"""The CUDA fuse_branches on a GPU, against its formula in float64 on that GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.ops.fuse_branches import fuse_branches
from tests.helpers.compare import TOLERANCE, assert_close, gradients, leaf
from tests.helpers.fuse_cases import Case, block_case, check
from tests.helpers.inputs import halving_sizes

from .device import captured, heavy, need_memory, need_two_devices, on_a_busy_stream

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])

SIZES = halving_sizes(100, 168, 5)


@pytest.fixture(autouse=True)
def _library() -> None:
    library.require("cuda")


# --- against the formula ------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("channels", [256, 255])
def test_pyramid(channels: int, images: int, dtype: torch.dtype) -> None:
    case = block_case(SIZES, channels=channels, images=images)
    check(case, case.tensors(dtype, DEVICE))


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        block_case([(400, 600), (200, 300)], channels=8, images=1),  # several patches for a block
        block_case(halving_sizes(7, 7, 2), channels=64, images=1000),  # regions
        block_case(halving_sizes(2, 3, 2), channels=2, images=40_000),  # more than at once
        block_case(halving_sizes(9, 9, 2), channels=1024),
        block_case(halving_sizes(5, 6, 2), channels=4100),
        Case(tuple([((4, 3), ((4, 3), (2, 2)))] * 33), channels=16),  # several launches
        Case((((1, 1), ((1, 1), (1, 1))), ((300, 1), ((1, 1), (300, 1), (7, 1)))), channels=40),
    ],
    ids=["large", "regions", "many images", "1024", "4100", "33 levels", "lines"],
)
def test_sizes(case: Case, dtype: torch.dtype) -> None:
    check(case, case.tensors(dtype, DEVICE))


@dtypes
def test_unaligned_rows(dtype: torch.dtype) -> None:
    case = block_case(halving_sizes(9, 7, 2), channels=64)
    y, *parameters = case.tensors(dtype, DEVICE)
    memory = torch.empty(y.numel() + 1, dtype=dtype, device=y.device)
    unaligned = memory[1:].view_as(y).copy_(y.detach()).requires_grad_()
    check(case, [unaligned, *parameters])


@heavy
def test_more_than_2_to_the_31_elements() -> None:
    height, width, channels = 3000, 3000, 256
    assert height * width * channels > 2**31
    need_memory(60)
    source = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=DEVICE).normal_(generator=source)

    large, small, pixels = (height, width), (2, 2), height * width
    y = normal(pixels + 4, channels, dtype=torch.bfloat16).requires_grad_()
    scale, shift, k = normal(2, 1, channels), normal(1, 1, channels), normal(1, 1, 4, channels)
    out = fuse_branches(y, scale, shift, k, 1, [large, small], [(large, [0, 1])])
    grad_out = normal(pixels, channels, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(out, y, grad_out)

    # The last line of the level, where the small map's lower line is read alone.
    begin = pixels - width
    line = leaf(y[begin:pixels], torch.float64)
    fraction = (torch.arange(width, device=DEVICE) / (width - 1)).double()[:, None]
    up = y[-2].double() * (1 - fraction) + y[-1].double() * fraction
    z = scale[0].double() * line + scale[1].double() * up + shift[0].double()
    a1, b1, a2, b2 = k[0, 0].double()
    expected = torch.maximum(a1 * z + b1, a2 * z + b2)
    (wanted,) = torch.autograd.grad(expected, line, grad_out[begin:].double())
    assert_close(out[begin:], expected, torch.bfloat16)
    assert_close(grad[begin:pixels], wanted, torch.bfloat16, factor=2)


# --- gradients and contracts of the operator ----------------------------------------------------


@dtypes
@pytest.mark.parametrize("channels", [256, 37])
def test_runs_give_the_same_bits(channels: int, dtype: torch.dtype) -> None:
    case = block_case(SIZES, channels=channels)
    tensors = case.tensors(dtype, DEVICE)

    def results() -> list[Tensor]:
        out = case.run(tensors)
        return [out.detach(), *gradients(out, tensors, dtype)]

    first = results()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(results(), first, strict=True))


# --- streams, graphs, devices -------------------------------------------------------------------


def test_runs_on_the_current_stream() -> None:
    case = block_case(halving_sizes(50, 50, 3), channels=64)
    tensors = [t.detach() for t in case.tensors(torch.float32, DEVICE)]
    expected = case.run(tensors)
    late = torch.full_like(tensors[0], math.nan)
    (out,) = on_a_busy_stream(late, tensors[0], lambda: [case.run([late, *tensors[1:]])])
    assert torch.equal(out, expected)


def test_graph_capture_with_the_backward() -> None:
    case = block_case(halving_sizes(50, 84, 3), channels=64)
    tensors = case.tensors(torch.bfloat16, DEVICE)
    grad_out = torch.randn_like(case.run(tensors))

    def step() -> list[Tensor]:
        out = case.run(tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad_out)]

    graph, found = captured(step)
    for seed in range(1, 4):
        with torch.no_grad():
            tensors[0].copy_(replace(case, seed=seed).tensors(torch.bfloat16, DEVICE)[0])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


def test_runs_on_the_device_of_its_tensors() -> None:
    need_two_devices()
    case = block_case(halving_sizes(20, 30, 3), channels=64)
    assert torch.cuda.current_device() == 0
    check(case, case.tensors(torch.float32, "cuda:1"))
    assert torch.cuda.current_device() == 0

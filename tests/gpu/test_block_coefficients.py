"""The CUDA block_coefficients on a GPU, against plain PyTorch in float64 on that GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.coefficients import (
    Case,
    all_gradients,
    block_case,
    check,
    run,
)

from .device import captured, launched, on_a_busy_stream

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SIZED = block_case(5, channels=256, num_groups=16, hidden=64)  # the default block's
computes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


# --- against the plain form ---------------------------------------------------------------------


@computes
@pytest.mark.parametrize(
    "case",
    [
        SIZED,
        block_case(5, channels=256, num_groups=16, hidden=64, images=40),
        block_case(3, channels=3000, num_groups=30, hidden=750, images=1),
        block_case(1, channels=4, num_groups=2, hidden=1, images=100_000),
    ],
    ids=["default", "many images", "wide", "more images than blocks of a grid's y"],
)
def test_sizes(case: Case, dtype: torch.dtype) -> None:
    check(case, case.tensors(dtype, device=DEVICE))


# --- special values -----------------------------------------------------------------------------


def test_more_channels_than_shared_memory_holds_raise() -> None:
    case = Case((0,), (0,), 1, 2**16, 1, 1, 1)
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        run(case, [t.detach() for t in case.tensors(device=DEVICE)])


# --- contracts of the operator ------------------------------------------------------------------


def test_parameters_on_the_cpu_raise() -> None:
    case = block_case(2)
    tensors = [t.detach() for t in case.tensors(device=DEVICE)]
    tensors[-1] = tensors[-1].cpu()
    with pytest.raises(RuntimeError, match="expected fc2_bias on the device"):
        run(case, tensors)


@computes
def test_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    tensors = SIZED.tensors(dtype, device=DEVICE)

    def results() -> list[Tensor]:
        outs = run(SIZED, tensors)
        return [*outs, *all_gradients(outs, tensors)]

    first = results()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(results(), first, strict=True))


def test_one_launch_forward_and_two_backward() -> None:
    tensors = SIZED.tensors(torch.float32, device=DEVICE)
    outs = run(SIZED, tensors)
    cotangents = [torch.randn_like(t) for t in outs]
    assert len(launched(lambda: run(SIZED, tensors))) == 1
    assert len(launched(lambda: torch.autograd.grad(outs, tensors, cotangents))) == 2
    mixed = SIZED.tensors(torch.float32, [torch.bfloat16, torch.float16], DEVICE)
    with torch.no_grad():
        assert len(launched(lambda: run(SIZED, mixed))) == 1


# --- streams and graphs -------------------------------------------------------------------------


def test_runs_on_the_current_stream() -> None:
    tensors = [t.detach() for t in SIZED.tensors(torch.float32, device=DEVICE)]
    expected = run(SIZED, tensors)
    late = torch.full_like(tensors[0], math.nan)
    outs = on_a_busy_stream(late, tensors[0], lambda: run(SIZED, [late, *tensors[1:]]))
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


def test_graph_capture() -> None:
    tensors = [t.detach() for t in SIZED.tensors(torch.float32, device=DEVICE)]
    graph, outs = captured(lambda: run(SIZED, tensors))
    for factor in (1.5, -0.5):
        tensors[0].mul_(factor)
        graph.replay()
        expected = run(SIZED, tensors)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))

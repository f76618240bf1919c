"""The CUDA block_coefficients on a GPU, against plain PyTorch in float64 on that GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dyhead_cuda.ops.block_coefficients import block_coefficients
from tests.helpers.coefficients import (
    CASES,
    Case,
    all_gradients,
    at_a_corner,
    block_case,
    check_gradients,
    plain,
)
from tests.helpers.compare import assert_close, leaf

from .device import captured, launched, on_a_busy_stream

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZED = block_case(5, channels=256, num_groups=16, hidden=64)  # the default block's
computes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def run(case: Case, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return block_coefficients(*case.arguments(tensors), **case.options())


def check(case: Case, tensors: Sequence[Tensor]) -> None:
    """Results and all gradients against the plain form in float64."""
    dtype = tensors[0].dtype
    exact = [leaf(t, torch.float64) for t in tensors]
    actual, expected = run(case, tensors), plain(case, exact)
    assert [t.dtype for t in actual] == [dtype] * 3
    assert_close(actual, expected, dtype)
    grads = all_gradients(actual, tensors)
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]
    check_gradients(grads, all_gradients(expected, exact), dtype)


# --- against the plain form ---------------------------------------------------------------------


@computes
@pytest.mark.sanitize
@pytest.mark.parametrize("name", ["three levels", "odd groups", "one of everything"])
def test_small(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], CASES[name].tensors(dtype, device=DEVICE))


@computes
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], CASES[name].tensors(dtype, device=DEVICE))


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


@computes
@pytest.mark.sanitize
@pytest.mark.parametrize("kinds", [[kind] for kind in STORAGE] + [STORAGE], ids=str)
def test_parameters_of_any_type(kinds: list[torch.dtype], dtype: torch.dtype) -> None:
    case = block_case(3, channels=24, num_groups=4, hidden=6)
    for shift in range(len(kinds)):
        check(case, case.tensors(dtype, kinds[shift:] + kinds[:shift], DEVICE))


# --- special values -----------------------------------------------------------------------------


@computes
@pytest.mark.parametrize("gate", [-1.0, 0.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("hidden", [-1.0, 0.0, 1.0])
def test_corners_have_the_slopes_of_torch(gate: float, hidden: float, dtype: torch.dtype) -> None:
    case = block_case(3, channels=12, num_groups=3, hidden=6)
    tensors = case.tensors(dtype, device=DEVICE)
    at_a_corner(tensors, gate, hidden)
    check(case, tensors)


@pytest.mark.sanitize
def test_no_images() -> None:
    case = block_case(2, images=0)
    tensors = case.tensors(torch.float32, device=DEVICE)
    outs = run(case, tensors)
    assert [t.shape for t in outs] == [(4, 0, 8), (2, 0, 8), (2, 0, 4, 8)]
    grads = torch.autograd.grad(outs, tensors, [torch.ones_like(t) for t in outs])
    assert not any(g.any() for g in grads)


@computes
def test_jobs_without_pixels(dtype: torch.dtype) -> None:
    case = block_case(3)
    tensors = case.tensors(dtype, device=DEVICE)
    with torch.no_grad():
        for moment in tensors[:3]:
            moment[2] = 0
        tensors[1][4] = 0
    check(case, tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("moment", range(3))
def test_non_finite_moments_stay_in_their_image(moment: int, value: float) -> None:
    case = Case((0, 0, 0), (0, 1, 2), images=3)
    tensors = case.tensors(device=DEVICE)
    with torch.no_grad():
        tensors[moment][2, 1, 5] = value
    for ours, theirs in zip(run(case, tensors), plain(case, tensors), strict=True):
        assert theirs[:, [0, 2]].isfinite().all()
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf() * ours.sign(), theirs.isinf() * theirs.sign())
        assert_close(ours[theirs.isfinite()], theirs[theirs.isfinite()])


def test_more_channels_than_shared_memory_holds_raise() -> None:
    case = Case((0,), (0,), 1, 2**16, 1, 1, 1)
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        run(case, [t.detach() for t in case.tensors(device=DEVICE)])


# --- contracts of the operator ------------------------------------------------------------------


def test_gradcheck() -> None:
    case = Case((0, 0, 1), (0, 2, 1), channels=4)
    tensors = case.tensors(device=DEVICE)
    assert torch.autograd.gradcheck(lambda *inputs: run(case, inputs), tensors)


@computes
def test_opcheck(dtype: torch.dtype) -> None:
    case = block_case(2)
    tensors = case.tensors(dtype, [torch.bfloat16, dtype], DEVICE)
    arguments = (*case.arguments(tensors), *case.options().values())
    torch.library.opcheck(torch.ops.dyhead.block_coefficients_fwd, arguments)


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

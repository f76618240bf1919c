"""The CUDA block_coefficients, compiled for the host, against plain PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.coefficients import (
    CASES,
    Case,
    all_gradients,
    at_a_corner,
    block_case,
    check_gradients,
    plain,
)
from tests.helpers.compare import assert_close, leaf, random_like

from .arrays import name_of, to_array, to_tensor
from .wanted import assert_only_wanted

STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
computes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

Call = Callable[..., Sequence[Any]]


def call(function: Call, arguments: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
    """Calls a binding with arguments, and then with parameters, each named by its type.

    Returns tensors, and None for what is not wanted.
    """

    def named(p: Any) -> Any:
        if isinstance(p, list) and isinstance(p[0], Tensor):
            return [named(t) for t in p]
        return (name_of(p.dtype), to_array(p)) if isinstance(p, Tensor) else p

    arrays = function(*(to_array(t) for t in arguments), *(named(p) for p in parameters))
    return [array if array is None else to_tensor(array, torch.float64) for array in arrays]


def forward(simt: Any, case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    """scale, shift, coefficients, norms and layers."""
    mean, var, up_mean, *parameters = case.arguments(tensors)
    options = case.options().values()
    return call(simt.block_coefficients.forward, (mean, var, up_mean), (*parameters, *options))


def backward(
    simt: Any,
    case: Case,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    wanted: Sequence[int] = (1,) * 11,
) -> list[Any]:
    """As the operator returns them, but None for what is not wanted."""
    mean, _, up_mean, weights, biases, gate_weight, _, fc1_weight, _, fc2_weight, _ = (
        case.arguments(tensors)
    )
    options = list(case.options().values())[:3]
    return call(
        simt.block_coefficients.backward,
        (*grads, mean, up_mean, *kept),
        (weights, biases, gate_weight, fc1_weight, fc2_weight, *options, list(wanted)),
    )


def run(simt: Any, case: Case, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients for the cotangents of ``all_gradients``."""
    *outs, norms, layers = forward(simt, case, tensors)
    cotangents = [t.to(out) for t, out in zip(random_like(*outs), outs, strict=True)]
    grads = backward(simt, case, tensors, (norms, layers), cotangents)
    # Of every tensor, as the autograd function arranges them.
    return outs, [*grads[:3], *grads[3], *grads[4], *grads[5:]]


def check(simt: Any, case: Case, tensors: Sequence[Tensor]) -> None:
    """Results and all gradients against the plain form in float64."""
    dtype = tensors[0].dtype
    exact = [leaf(t, torch.float64) for t in tensors]
    expected = plain(case, exact)
    outs, grads = run(simt, case, tensors)
    assert {t.dtype for t in [*outs, *grads]} == {dtype}
    assert_close(outs, expected, dtype)
    check_gradients(grads, all_gradients(expected, exact), dtype)


# --- against the plain form ---------------------------------------------------------------------


@computes
@pytest.mark.parametrize("name", CASES)
def test_cases(simt: Any, name: str, dtype: torch.dtype) -> None:
    simt.set_seed(1)
    check(simt, CASES[name], CASES[name].tensors(dtype))


@computes
@pytest.mark.usefixtures("seed")
def test_orders_of_threads(simt: Any, dtype: torch.dtype) -> None:
    case = block_case(3, channels=72, num_groups=3, hidden=37)
    check(simt, case, case.tensors(dtype))


@computes
@pytest.mark.parametrize("kinds", [[kind] for kind in STORAGE] + [STORAGE], ids=str)
def test_parameters_of_any_type(simt: Any, kinds: list[torch.dtype], dtype: torch.dtype) -> None:
    case = block_case(2, channels=40, num_groups=4, hidden=9, images=1)
    for shift in range(len(kinds)):
        check(simt, case, case.tensors(dtype, kinds[shift:] + kinds[:shift]))


@settings(max_examples=15)
@given(
    job_levels=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    images=st.integers(1, 3),
    width=st.integers(1, 40),
    num_groups=st.integers(1, 5),
    hidden=st.integers(1, 70),
    norms=st.integers(1, 8),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_random_cases(
    simt: Any,
    job_levels: list[int],
    images: int,
    width: int,
    num_groups: int,
    hidden: int,
    norms: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    simt.set_seed(seed)
    used = sorted(set(job_levels))
    jobs = tuple(used.index(level) for level in job_levels)
    branches = tuple((seed + 3 * j) % norms for j in range(len(jobs)))
    case = Case(jobs, branches, images, width * num_groups, num_groups, hidden, norms, 1e-3, seed)
    check(simt, case, case.tensors(dtype))


# --- special values -----------------------------------------------------------------------------


@computes
@pytest.mark.parametrize("gate", [-1.0, 0.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("hidden", [-1.0, 0.0, 1.0])
def test_corners_have_the_slopes_of_torch(
    simt: Any, gate: float, hidden: float, dtype: torch.dtype
) -> None:
    case = block_case(2, channels=12, num_groups=3, hidden=6)
    tensors = case.tensors(dtype)
    at_a_corner(tensors, gate, hidden)
    check(simt, case, tensors)


@computes
def test_no_images(simt: Any, dtype: torch.dtype) -> None:
    case = block_case(2, images=0)
    tensors = case.tensors(dtype)
    outs, grads = run(simt, case, tensors)
    assert [t.shape for t in outs] == [(4, 0, 8), (2, 0, 8), (2, 0, 4, 8)]
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert not any(g.any() for g in grads)


@computes
def test_jobs_without_pixels(simt: Any, dtype: torch.dtype) -> None:
    case = block_case(3)
    tensors = case.tensors(dtype)
    with torch.no_grad():
        for moment in tensors[:3]:
            moment[2] = 0
        tensors[1][4] = 0
    check(simt, case, tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("moment", range(3))
def test_non_finite_moments_stay_in_their_image(simt: Any, moment: int, value: float) -> None:
    case = Case((0, 0, 0), (0, 1, 2), images=3)
    tensors = case.tensors()
    with torch.no_grad():
        tensors[moment][2, 1, 5] = value
    *outs, norms, layers = forward(simt, case, tensors)
    for ours, theirs in zip(outs, plain(case, tensors), strict=True):
        assert theirs[:, [0, 2]].isfinite().all()
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf() * ours.sign(), theirs.isinf() * theirs.sign())
        assert_close(ours[theirs.isfinite()], theirs[theirs.isfinite()])
    grads = backward(simt, case, tensors, (norms, layers), [torch.ones_like(t) for t in outs])
    for grad in grads[:3]:
        assert grad[:, [0, 2]].isfinite().all()


# --- what is not wanted --------------------------------------------------------------------------


@computes
def test_only_what_is_wanted(simt: Any, dtype: torch.dtype) -> None:
    simt.set_seed(1)
    case = block_case(3, channels=24, num_groups=3, hidden=7)
    tensors = case.tensors(dtype)
    *outs, norms, layers = forward(simt, case, tensors)
    assert_only_wanted(
        lambda wanted: backward(simt, case, tensors, (norms, layers), outs, wanted), 11
    )


# --- determinism --------------------------------------------------------------------------------


@computes
def test_every_order_gives_the_same_bits(simt: Any, dtype: torch.dtype) -> None:
    case = block_case(3, channels=70, num_groups=7, hidden=40)
    tensors = case.tensors(dtype)

    def results(seed: int) -> list[Tensor]:
        simt.set_seed(seed)
        outs, grads = run(simt, case, tensors)
        return [*outs, *grads]

    first = results(0)
    for seed in range(1, 5):
        assert all(torch.equal(a, b) for a, b in zip(results(seed), first, strict=True))

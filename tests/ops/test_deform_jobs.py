"""``dyhead::deform_conv``: lists of jobs against the reference, map by map, on each device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.ops.jobs import map_rows
from tests.helpers.compare import TOLERANCE, assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.deform_checks import (
    assert_second_derivative_raises,
    assert_threads_give_the_same_bits,
    check,
)
from tests.helpers.deform_work import CONVOLUTIONS, PLAIN, WORKS, ManyJobs, Work
from tests.helpers.devices import each_device

library.require("cpu")


@each_device
@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_jobs_equal_the_reference_with_all_gradients(
    name: str, dtype: torch.dtype, device: str
) -> None:
    check(WORKS[name], dtype, WORKS[name].tensors(dtype, device))


def test_results_in_the_compute_type_are_computed_in_it() -> None:
    """Predicted offsets: rounding float32 weights to bfloat16 would move samples."""
    work = Work(moments=False, out_in_compute_dtype=True, channels=34)
    tensors = work.tensors(torch.bfloat16)
    assert_close(work.run(tensors), work.reference(tensors), torch.float32)


@each_device
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *PLAIN])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_convolutions_equal_the_reference(name: str, dtype: torch.dtype, device: str) -> None:
    call = (CONVOLUTIONS | PLAIN)[name]
    check(call, dtype, call.tensors(dtype, device))


@each_device
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_jobs(dtype: torch.dtype, device: str) -> None:
    """On a GPU they take several launches."""
    check(ManyJobs(), dtype, ManyJobs().tensors(dtype, device))


@each_device
@pytest.mark.parametrize("name", ["all", "without moments", "plain masks"])
def test_gradcheck_of_all_inputs_and_moments(name: str, device: str) -> None:
    work = replace(WORKS[name], images=1, out_channels=2)
    tensors = work.tensors(device=device)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(work.run(dict(zip(tensors, values, strict=True))))

    # On a GPU the sums of the source's gradient depend on the order of additions.
    tolerance = {"cpu": 0.0, "cuda": 1e-10}[device]
    assert torch.autograd.gradcheck(run, tuple(tensors.values()), nondet_tol=tolerance)


@pytest.mark.parametrize("used", range(4))
def test_gradients_of_one_output_alone(used: int) -> None:
    work = Work()
    tensors = work.tensors()
    exact = {name: leaf(t) for name, t in tensors.items()}
    assert_gradients_close(
        gradients(work.run(tensors)[used], list(tensors.values())),
        gradients(work.reference(exact)[used], list(exact.values())),
    )


def test_what_is_not_read_has_no_gradient() -> None:
    work = WORKS["several chunks"]
    tensors = work.tensors()
    names = list(tensors)
    for _ in range(3):  # in memory that held something else before
        grads = dict(zip(names, gradients(work.run(tensors), list(tensors.values())), strict=True))
        counts = map_rows(work.plan.sources, work.images)
        rows = slice(sum(counts[:2]), sum(counts[:3]))
        for name, part in (("source", rows), ("weights", 3), ("bias", 3)):
            assert (grads[name][part] == 0).all()
            assert (grads[name] != 0).any()
        assert (grads["gates"][:, 2] == 0).all()


def test_moments_of_large_values_keep_their_digits() -> None:
    work = Work(scale=9, channels=3)
    tensors = work.tensors(torch.float32)
    with torch.no_grad():
        tensors["bias"] += 1e4
    exact = {name: t.double() for name, t in tensors.items()}
    out, mean, var, up_mean = work.run(tensors)
    expected = work.reference(exact)
    assert_close([out, mean, up_mean], [expected[i] for i in (0, 1, 3)], torch.float32)
    # An error of the values themselves of 2^-24 * 1e4 is 3e-4 of a deviation of about 2.
    assert_close(var, expected[2], torch.float32, factor=500)


@each_device
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("all", dtype) for dtype in TOLERANCE),
        *((name, torch.float32) for name in ("wide", "without bias and gates", "no images")),
    ],
)
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    work = WORKS[name]
    tensors = work.tensors(dtype, device)
    torch.library.opcheck(torch.ops.dyhead.deform_conv_fwd, work.arguments(tensors))
    torch.library.opcheck(torch.ops.dyhead.deform_conv_bwd, work.backward_arguments(tensors))


def test_a_second_derivative_raises() -> None:
    assert_second_derivative_raises(Work())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_and_runs_give_the_same_bits(dtype: torch.dtype, threads: None) -> None:
    assert_threads_give_the_same_bits(Work(channels=130, out_channels=70, scale=7), dtype)

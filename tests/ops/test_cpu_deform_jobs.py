"""``dyhead::deform_conv`` on the CPU: lists of jobs against the reference, map by map."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.ops.common import compute_dtype
from tests.helpers.compare import TOLERANCE, assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.deform_work import WORKS, Work

library.require("cpu")


def check_work(work: Work, dtype: torch.dtype) -> None:
    tensors = work.tensors(dtype)
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    actual, expected = work.run(tensors), work.reference(exact)
    assert actual[0].dtype == (compute_dtype(dtype) if work.out_in_compute_dtype else dtype)
    if work.images == 0:
        assert [t.shape for t in actual] == [t.shape for t in expected]
        grads = gradients(actual, list(tensors.values()))
        assert all((g == 0).all() for g in grads)
        return
    assert_close(actual, expected, dtype)
    assert_gradients_close(
        gradients(actual, list(tensors.values()), dtype),
        gradients(expected, list(exact.values()), dtype),
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", WORKS)
def test_jobs_equal_the_reference_with_all_gradients(name: str, dtype: torch.dtype) -> None:
    check_work(WORKS[name], dtype)


@pytest.mark.parametrize("name", ["all", "without moments", "plain masks"])
def test_gradcheck_of_all_inputs_and_moments(name: str) -> None:
    work = replace(WORKS[name], images=1, out_channels=2)
    tensors = work.tensors()

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(work.run(dict(zip(tensors, values, strict=True))))

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


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
        unread = work.plan.sources[2]
        rows = slice(unread.first_row, unread.first_row + work.images * unread.pixels)
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["all", "wide", "without bias and gates", "no images"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    work = WORKS[name]
    tensors = work.tensors(dtype)
    torch.library.opcheck(torch.ops.dyhead.deform_conv_fwd, work.arguments(tensors))
    torch.library.opcheck(torch.ops.dyhead.deform_conv_bwd, work.backward_arguments(tensors))


def test_a_second_derivative_raises() -> None:
    tensors = Work().tensors()
    out = Work().run(tensors)[0]
    (grad,) = torch.autograd.grad(out.sum(), [tensors["source"]], create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable again"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_and_runs_give_the_same_bits(dtype: torch.dtype, threads: None) -> None:
    work = Work(channels=130, out_channels=70, scale=7)
    first = None
    for count in (1, 2, 7, 7):
        torch.set_num_threads(count)
        tensors = work.tensors(dtype)
        outputs = work.run(tensors)
        results = [*outputs, *gradients(outputs, list(tensors.values()))]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))

"""``dyhead::block_coefficients`` on the CPU against the same in plain PyTorch, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import group_norm, interpolate, linear

from dyhead_cuda import backend, functional, library
from dyhead_cuda.ops.block_coefficients import MAX_JOBS, calls_of
from dyhead_cuda.pyramid import BlockParameters
from dyhead_cuda.reference import hsigmoid
from tests.helpers.coefficients import (
    CASES,
    Case,
    all_gradients,
    at_a_corner,
    backward_arguments,
    block_case,
    check,
    operator_arguments,
    plain,
    run,
)
from tests.helpers.compare import assert_close, assert_gradients_close, leaf
from tests.helpers.devices import each_device
from tests.helpers.inputs import (
    flat_parameters,
    halving_sizes,
    random_block_parameters,
    random_pyramid,
    rebuild_parameters,
)
from tests.helpers.profiles import profile

library.require("cpu")

Size = tuple[int, int]
STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
computes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


# --- against the plain form ---------------------------------------------------------------------


@computes
@each_device
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, device: str, dtype: torch.dtype) -> None:
    check(CASES[name], CASES[name].tensors(dtype, device=device))


@computes
@each_device
@pytest.mark.parametrize("kinds", [[kind] for kind in STORAGE] + [STORAGE], ids=str)
def test_parameters_of_any_type(kinds: list[torch.dtype], device: str, dtype: torch.dtype) -> None:
    case = block_case(3, channels=24, num_groups=4, hidden=6)
    for shift in range(len(kinds)):
        check(case, case.tensors(dtype, kinds[shift:] + kinds[:shift], device))


@given(
    job_levels=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    images=st.integers(1, 4),
    width=st.integers(1, 9),
    num_groups=st.integers(1, 6),
    hidden=st.integers(1, 12),
    norms=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_random_cases(
    job_levels: list[int],
    images: int,
    width: int,
    num_groups: int,
    hidden: int,
    norms: int,
    seed: int,
    data: st.DataObject,
) -> None:
    used = sorted(set(job_levels))
    jobs = tuple(used.index(level) for level in job_levels)
    branches = tuple(data.draw(st.integers(0, norms - 1)) for _ in jobs)
    case = Case(jobs, branches, images, width * num_groups, num_groups, hidden, norms, 1e-3, seed)
    check(case, case.tensors())


def test_equals_the_layers() -> None:
    """The definition: normalise, gate and average maps, then the dynamic ReLU's layers."""
    case = Case()
    job_sizes = [(6, 7), (3, 4), (3, 4), (3, 4), (2, 2), (2, 2), (2, 2)]
    level_sizes = [(6, 7), (3, 4), (2, 2)]
    tensors = case.tensors()
    _, _, _, weights, biases, gate_weight, gate_bias, *layers = case.arguments(tensors)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = layers
    ys = random_pyramid(2, 8, job_sizes)
    ups = [
        interpolate(y, level_sizes[level], mode="bilinear", align_corners=True)
        for y, level in zip(ys, case.job_levels, strict=True)
    ]
    moments = [
        torch.stack([y.mean((2, 3)) for y in ys]),
        torch.stack([y.var((2, 3), correction=0) for y in ys]),
        torch.stack([up.mean((2, 3)) for up in ups]),
    ]
    scale, shift, relu = run(case, [*moments, *tensors[3:]])
    for level, size in enumerate(level_sizes):
        jobs = [j for j, of in enumerate(case.job_levels) if of == level]
        actual = shift[level][:, :, None, None] + sum(
            scale[j][:, :, None, None] * ups[j] for j in jobs
        )
        expected = torch.zeros(2, 8, *size, dtype=torch.float64)
        for j in jobs:
            branch = case.job_branches[j]
            y = group_norm(ys[j], 2, weights[branch], biases[branch], case.eps)
            y = interpolate(y, size, mode="bilinear", align_corners=True)
            gate = hsigmoid((y.mean((2, 3)) @ gate_weight + gate_bias).relu())
            expected = expected + gate[:, None, None, None] * y / len(jobs)
        assert_close(actual, expected)
        hidden = linear(expected.mean((2, 3)), fc1_weight, fc1_bias).relu()
        t = 2 * hsigmoid(linear(hidden, fc2_weight, fc2_bias)).view(2, 4, 8) - 1
        assert_close(relu[level], torch.stack([1 + t[:, 0], t[:, 1] / 2, t[:, 2], t[:, 3] / 2], 1))


@each_device
def test_gradcheck(device: str, threads: None) -> None:
    torch.set_num_threads(1)  # hundreds of calls with next to nothing to do
    case = Case((0, 0, 1), (0, 2, 1), channels=4)
    assert torch.autograd.gradcheck(
        lambda *tensors: run(case, tensors), case.tensors(device=device)
    )


def test_sums_over_many_images_keep_the_precision_of_float32() -> None:
    case = block_case(1, channels=4, num_groups=2, hidden=1, images=100_000)
    check(case, case.tensors(torch.float32))


# --- special values -----------------------------------------------------------------------------


@computes
@each_device
@pytest.mark.parametrize("gate", [-1.0, 0.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("hidden", [-1.0, 0.0, 1.0])
def test_corners_have_the_slopes_of_torch(
    gate: float, hidden: float, device: str, dtype: torch.dtype
) -> None:
    case = block_case(3, channels=12, num_groups=3, hidden=6)
    tensors = case.tensors(dtype, device=device)
    at_a_corner(tensors, gate, hidden)
    check(case, tensors)


@computes
@each_device
def test_no_images(device: str, dtype: torch.dtype) -> None:
    case = block_case(2, images=0)
    tensors = case.tensors(dtype, device=device)
    outs = run(case, tensors)
    assert [t.shape for t in outs] == [(4, 0, 8), (2, 0, 8), (2, 0, 4, 8)]
    grads = torch.autograd.grad(outs, tensors, [torch.ones_like(t) for t in outs])
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert not any(g.any() for g in grads)


@computes
@each_device
def test_jobs_without_pixels(device: str, dtype: torch.dtype) -> None:
    """Their moments are zeros; a constant map's variance is, too."""
    case = block_case(3)
    tensors = case.tensors(dtype, device=device)
    with torch.no_grad():
        for moment in tensors[:3]:
            moment[2] = 0
        tensors[1][4] = 0
    check(case, tensors)


@each_device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("moment", range(3))
def test_non_finite_moments_stay_in_their_image(moment: int, value: float, device: str) -> None:
    case = Case((0, 0, 0), (0, 1, 2), images=3)
    tensors = case.tensors(device=device)
    with torch.no_grad():
        tensors[moment][2, 1, 5] = value
    for ours, theirs in zip(run(case, tensors), plain(case, tensors), strict=True):
        assert theirs[:, [0, 2]].isfinite().all()
        assert theirs[:, 1].isfinite().all() <= math.isinf(value)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf() * ours.sign(), theirs.isinf() * theirs.sign())
        assert_close(ours[theirs.isfinite()], theirs[theirs.isfinite()])


# --- autograd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(Case.norms * 2 + 9))
def test_a_gradient_of_one_tensor_alone(place: int) -> None:
    case = Case()
    tensors = [t.detach().requires_grad_(i == place) for i, t in enumerate(case.tensors())]
    (actual,) = all_gradients(run(case, tensors), [tensors[place]])
    everything = case.tensors()
    expected = all_gradients(plain(case, everything), everything)
    assert_gradients_close([actual], [expected[place]])


@pytest.mark.parametrize("used", range(3))
def test_a_gradient_through_one_result_alone(used: int) -> None:
    case = Case()
    tensors = case.tensors()
    assert_gradients_close(
        all_gradients(run(case, tensors)[used : used + 1], tensors),
        all_gradients(plain(case, tensors)[used : used + 1], tensors),
    )


def test_a_normalisation_without_jobs_gets_no_gradient() -> None:
    case = block_case(1)
    tensors = case.tensors()
    torch.stack([t.sum() for t in run(case, tensors)]).sum().backward()
    missing = [i for i, t in enumerate(tensors) if t.grad is None]
    assert missing == [3 + 0, 3 + 2, 6 + 0, 6 + 2]  # weights and biases of low and high


def test_strided_arguments() -> None:
    case = block_case(2)
    tensors = case.tensors()
    strange = [leaf(torch.stack([t, t], -1)).select(-1, 0) for t in tensors]
    assert not any(t.is_contiguous() for t in strange if t.numel() > 1)
    for a, b in zip(run(case, strange), run(case, tensors), strict=True):
        assert torch.equal(a, b)
    shapes = [t.mT.shape for t in plain(case, tensors)]
    cotangents = [torch.randn(shape, dtype=torch.float64).mT for shape in shapes]
    actual = torch.autograd.grad(run(case, strange), strange, cotangents)
    expected = torch.autograd.grad(
        run(case, tensors), tensors, [t.contiguous() for t in cotangents]
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_second_derivative_raises() -> None:
    case = Case()
    tensors = case.tensors()
    (grad,) = torch.autograd.grad(run(case, tensors)[0].sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable again"):
        grad.sum().backward()


@computes
@each_device
@pytest.mark.parametrize("images", [0, 2])
def test_opcheck(images: int, device: str, dtype: torch.dtype) -> None:
    case = replace(block_case(2), images=images)
    for kinds in ([dtype], [torch.bfloat16, dtype]):
        tensors = case.tensors(dtype, kinds, device)
        arguments = operator_arguments(case, tensors)
        torch.library.opcheck(torch.ops.dyhead.block_coefficients_fwd, arguments)
        torch.library.opcheck(
            torch.ops.dyhead.block_coefficients_bwd, backward_arguments(case, tensors)
        )


@computes
def test_threads_and_runs_give_the_same_bits(dtype: torch.dtype, threads: None) -> None:
    case = block_case(5, images=3, channels=96, num_groups=16, hidden=200)
    first: list[Tensor] = []
    for count in (1, 2, 7, 7):
        torch.set_num_threads(count)
        tensors = case.tensors(dtype)
        outs = run(case, tensors)
        results = [*outs, *all_gradients(outs, tensors)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


# --- in a block ---------------------------------------------------------------------------------


def block_inputs(dtype: torch.dtype) -> tuple[list[Tensor], BlockParameters]:
    features = [leaf(x, dtype) for x in random_pyramid(2, 5, halving_sizes(9, 7, 3))]
    parameters = random_block_parameters(5, 8, dtype=dtype)
    tensors = [leaf(t) for t in flat_parameters(parameters)]
    return features, rebuild_parameters(parameters, tensors)


def test_a_block_converts_none_of_its_small_parameters() -> None:
    features, parameters = block_inputs(torch.bfloat16)
    with profile() as profiled, torch.no_grad(), backend("cpu"):
        functional.pyramid_block(features, parameters, num_groups=4)
    names = [event.name for event in profiled.events()]
    assert names.count("dyhead::block_coefficients_fwd") == 1
    # Only weights and biases of convolutions: of the offsets' and of the three branches'.
    assert names.count("aten::_to_copy") <= 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_of_a_block() -> None:
    features, parameters = block_inputs(torch.float64)

    def block(*levels: Tensor) -> list[Tensor]:
        return functional.pyramid_block(levels, parameters, num_groups=4)

    with backend("cpu"):
        expected = block(*features)
        actual = torch.compile(block, backend="aot_eager", fullgraph=True)(*features)
    assert_close(actual, expected)
    inputs = [*features, *flat_parameters(parameters)]
    assert_gradients_close(all_gradients(actual, inputs), all_gradients(expected, inputs))


# --- checks -------------------------------------------------------------------------------------

BAD_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no jobs": ({"job_levels": [], "job_branches": []}, "at least one job"),
    "a branch too few": ({"job_branches": [1, 2, 1]}, "a level and a branch for each"),
    "too many jobs": ({"job_levels": [0] * 129, "job_branches": [0] * 129}, "at most 128 jobs"),
    "a level without jobs": ({"job_levels": [0, 0, 2, 2]}, "none of level 1 out of 3"),
    "a negative level": ({"job_levels": [0, -1, 1, 1]}, "not negative"),
    "negative levels": ({"job_levels": [-1] * 4}, "a level from 0"),
    "a level beyond": ({"job_levels": [0, 0, 1, 2**40]}, "a level from 0 to 127"),
    "an unknown branch": ({"job_branches": [0, 1, 2, 3]}, "a branch from 0 to 2, got 3"),
    "a negative branch": ({"job_branches": [0, 1, 2, -1]}, "a branch from 0 to 2, got -1"),
    "more jobs than moments": ({"job_levels": [0] * 5, "job_branches": [0] * 5}, "expected mean"),
    "fewer jobs than moments": ({"job_levels": [0], "job_branches": [0]}, "expected mean"),
    "no groups": ({"num_groups": 0}, "num_groups from 1"),
    "groups that do not divide": ({"num_groups": 3}, "8 channels and 3 groups"),
    "huge groups": ({"num_groups": 2**33}, "num_groups from 1"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_raise(name: str) -> None:
    case = block_case(2)
    changes, message = BAD_TABLES[name]
    tensors = [t.detach() for t in case.tensors()]
    *tables, eps = (case.options() | changes).values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.block_coefficients_fwd(*case.arguments(tensors), *tables, eps)
    *arguments, _, _, _, wanted = backward_arguments(case, tensors)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.block_coefficients_bwd(*arguments, *tables, wanted)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda t: torch.cat([t, t], -1),
    "empty": lambda t: t[..., :0].contiguous(),
    "one dimension more": lambda t: t.unsqueeze(0),
    "not contiguous": lambda t: torch.stack([t, t], -1)[..., 0],
    "integers": lambda t: t.long(),
    "no tensor": lambda t: torch.tensor(1.0, dtype=t.dtype),
}


def leaves(arguments: Sequence[Any]) -> list[tuple[int, ...]]:
    """Where the tensors are in arguments: (place,) or, in a list, (place, index)."""
    found: list[tuple[int, ...]] = []
    for place, value in enumerate(arguments):
        if isinstance(value, Tensor):
            found.append((place,))
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            found += [(place, i) for i in range(len(value))]
    return found


def with_fault(
    arguments: Sequence[Any], where: tuple[int, ...], fault: Callable[[Tensor], Tensor]
) -> list[Any]:
    changed: list[Any] = [list(v) if isinstance(v, list) else v for v in arguments]
    if len(where) == 1:
        changed[where[0]] = fault(changed[where[0]])
    else:
        changed[where[0]][where[1]] = fault(changed[where[0]][where[1]])
    return changed


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_bad_tensors_raise(direction: str, fault: str) -> None:
    case = block_case(2)
    tensors = [t.detach() for t in case.tensors()]
    forward = direction == "fwd"
    arguments = (operator_arguments if forward else backward_arguments)(case, tensors)
    operator = getattr(torch.ops.dyhead, f"block_coefficients_{direction}")
    operator(*arguments)
    places = leaves(arguments)
    assert len(places) == (15 if forward else 16)
    for where in places:
        if fault == "not contiguous" and forward and where == (6,):
            continue  # the gate's bias: a single value is always contiguous
        with pytest.raises(RuntimeError, match="expected"):
            operator(*with_fault(arguments, where, WRONG[fault]))


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_moments_of_another_type_raise(direction: str) -> None:
    case = block_case(2)
    tensors = [t.detach() for t in case.tensors()]
    make = operator_arguments if direction == "fwd" else backward_arguments
    arguments = make(case, tensors)
    operator = getattr(torch.ops.dyhead, f"block_coefficients_{direction}")
    for place in range(3 if direction == "fwd" else 7):
        for fault in (Tensor.float, Tensor.bfloat16):
            with pytest.raises(RuntimeError, match="expected"):
                operator(*with_fault(arguments, (place,), fault))
    biases = 4 if direction == "fwd" else 8
    changed = list(arguments)
    changed[biases] = changed[biases][:2]
    with pytest.raises(RuntimeError, match="as many norm_biases"):
        operator(*changed)


def test_calls_have_whole_levels_and_all_jobs() -> None:
    levels = block_case(100).job_levels
    calls = calls_of(levels)
    assert [j for jobs in calls for j in range(len(levels))[jobs]] == list(range(len(levels)))
    assert all(len(levels[jobs]) <= MAX_JOBS for jobs in calls)
    assert all(levels[a.stop - 1] != levels[b.start] for a, b in pairwise(calls))
    assert len(calls) == 3


def test_a_call_takes_as_many_jobs_as_is_said() -> None:
    for jobs, fits in ((MAX_JOBS, True), (MAX_JOBS + 1, False)):
        case = Case((0,) * jobs, (0,) * jobs, images=1)
        arguments = operator_arguments(case, [t.detach() for t in case.tensors()])
        with nullcontext() if fits else pytest.raises(RuntimeError, match="some of the levels"):
            torch.ops.dyhead.block_coefficients_fwd(*arguments)

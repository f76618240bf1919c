"""``dyhead::fuse_branches`` against its formula in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.ops.jobs import map_rows
from tests.helpers.compare import TOLERANCE, assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.devices import each_device
from tests.helpers.fuse_cases import CASES, RANDOM_CASES, Case, Size, block_case, check
from tests.helpers.inputs import halving_sizes

library.require("cpu")


@each_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula_with_all_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    check(CASES[name], CASES[name].tensors(dtype, device))


@each_device
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_whole_vectors(dtype: torch.dtype, device: str) -> None:
    case = block_case(halving_sizes(13, 21, 3), channels=64)
    check(case, case.tensors(dtype, device))


@each_device
def test_no_images(device: str) -> None:
    case = replace(CASES["two levels"], images=0)
    check(case, case.tensors(torch.float32, device))


@given(RANDOM_CASES)
@example(Case((((7, 5), ((4, 3), (7, 5))),), images=0))
def test_random_cases(case: Case) -> None:
    check(case, case.tensors())


def test_a_large_map_keeps_the_precision_of_float32() -> None:
    case = Case((((200, 336), ((100, 168),)),), images=1, channels=8)
    check(case, case.tensors(torch.float32))


@each_device
@pytest.mark.parametrize(
    "case",
    [block_case(halving_sizes(3, 5, 2)), CASES["from and to 1x1"], Case((((2, 3), ((5, 4),)),))],
    ids=["block", "from and to 1x1", "smaller level"],
)
def test_gradcheck(case: Case, device: str, threads: None) -> None:
    torch.set_num_threads(1)  # hundreds of calls with next to nothing to do
    case = replace(case, channels=2)
    tensors = case.tensors(device=device)
    assert torch.autograd.gradcheck(lambda *inputs: case.run(list(inputs)), tensors)


@each_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("images", [0, 2])
def test_opcheck(images: int, dtype: torch.dtype, device: str) -> None:
    case = replace(CASES["two levels"], images=images)
    tables = case.tables()
    tensors = case.tensors(dtype, device)
    torch.library.opcheck(torch.ops.dyhead.fuse_branches_fwd, (*tensors, *tables))
    plain = [t.detach() for t in tensors]
    grad_out = torch.randn_like(case.run(plain))
    torch.library.opcheck(torch.ops.dyhead.fuse_branches_bwd, (grad_out, *plain, *tables, ALL))


def test_a_tie_is_split() -> None:
    case = block_case(halving_sizes(3, 4, 2))
    tensors = case.tensors()
    with torch.no_grad():
        tensors[3][:, :, 2:] = tensors[3][:, :, :2]
    exact = [leaf(t) for t in tensors]
    actual, expected = case.run(tensors), case.reference(exact)
    assert_close(actual, expected)
    grads = gradients(actual, tensors)
    assert_gradients_close(grads, gradients(expected, exact))
    assert torch.equal(grads[3][:, :, :2], grads[3][:, :, 2:])


@each_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [20, 24])
def test_non_finite_values_pass_through(channels: int, dtype: torch.dtype, device: str) -> None:
    case = block_case(halving_sizes(9, 14, 2), channels=channels)
    tensors = case.tensors(dtype, device)
    with torch.no_grad():
        tensors[0][::11, 3], tensors[0][5, 7:] = math.nan, math.inf
    expected = case.reference(tensors)
    actual = case.run(tensors)
    assert 0 < expected.isnan().sum() < expected.numel()
    assert torch.equal(actual.isnan(), expected.isnan())
    for value in (math.inf, -math.inf):
        assert torch.equal(actual == value, expected == value)


@each_device
@pytest.mark.parametrize("empty", [(0, 4), (4, 0), (0, 0)])
def test_levels_without_pixels(empty: Size, device: str) -> None:
    full: tuple[Size, tuple[Size, ...]] = ((5, 4), ((5, 4), (3, 2)))
    case = Case((full, (empty, (empty, (3, 2))), full))
    tensors = case.tensors(device=device)
    exact = [leaf(t) for t in tensors]
    actual, expected = case.run(tensors), case.reference(exact)
    assert_close(actual, expected)
    grads = gradients(actual, tensors)
    assert_gradients_close(grads, gradients(expected, exact))
    unread = grads[0].split(map_rows(case.plan()["branches"], case.images))[3]
    assert (unread == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_and_runs_give_the_same_bits(dtype: torch.dtype, threads: None) -> None:
    case = block_case(halving_sizes(50, 84, 4), channels=19)
    first = None
    for count in (1, 2, 7, 7):
        torch.set_num_threads(count)
        tensors = case.tensors(dtype)
        out = case.run(tensors)
        results = [out, *gradients(out, tensors)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_strided_arguments_and_another_parameter_type() -> None:
    case = CASES["two levels"]
    tensors = case.tensors(torch.float32)
    expected = case.run(tensors)
    strange = [
        leaf(t, torch.float32 if i == 0 else torch.float64).mT.contiguous().mT
        for i, t in enumerate(tensors)
    ]
    assert not any(t.is_contiguous() for t in strange)
    actual = case.run(strange)
    assert torch.equal(actual, expected)
    cotangent = torch.randn(expected.mT.shape).mT
    actual_grads = torch.autograd.grad(actual, strange, cotangent)
    expected_grads = torch.autograd.grad(expected, tensors, cotangent.contiguous())
    assert [g.dtype for g in actual_grads] == [torch.float32, *[torch.float64] * 3]
    assert all(torch.equal(a, b) for a, b in zip(actual_grads, expected_grads, strict=True))


def test_a_second_derivative_raises() -> None:
    case = CASES["one level"]
    tensors = case.tensors()
    (grad,) = torch.autograd.grad(case.run(tensors).sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable again"):
        grad.sum().backward()


# Three branches of 2x3, 1x2 and 2x3 pixels, and two levels of 2x3.
ALL = [1] * 4  # gradients wanted
GOOD: dict[str, Any] = {
    "branch_sizes": [2, 3, 1, 2, 2, 3],
    "level_sizes": [2, 3, 2, 3],
    "level_branches": [0, 1, -1, 2, -1, -1],
    "up_mode": 0,
}
HUGE = 2**31 - 1
# name: argument, its value, message
BAD_TABLES: dict[str, tuple[str, Any, str]] = {
    "no levels": ("level_sizes", [], "3 branches for each of at least one level"),
    "a level's branches cut off": ("level_branches", [0, 1, -1, 2, -1], "got 5 for 2 levels"),
    "a branch's size cut off": ("branch_sizes", [2, 3, 1, 2, 2], "branch sizes of 2 n integers"),
    "a level's size cut off": ("level_sizes", [2, 3, 2], "level sizes of 2 n integers"),
    "a map too few": ("branch_sizes", [2, 3, 4, 2], "expected scale"),
    "a level too few": ("level_sizes", [2, 3], "got 6 for 1 levels"),
    "rows left over": ("branch_sizes", [2, 3, 1, 2, 2, 2], "cover all 28 rows"),
    "too many rows": ("branch_sizes", [2, 3, 1, 2, 2, 4], "within 28 rows"),
    "a negative size": ("branch_sizes", [2, 3, 1, 2, -2, -3], "the height of a map"),
    "a size that overflows": ("branch_sizes", [2, 3, 1, 2, HUGE, HUGE], "maps of at most"),
    "a size beyond 32 bits": ("branch_sizes", [2, 3, 1, 2, 2**32 + 2, 3], "the height of a map"),
    "a level that overflows": ("level_sizes", [HUGE, HUGE, 2, 3], "maps of at most"),
    "no branches": ("level_branches", [0, 1, 2, -1, -1, -1], "a level of 1 to 3 branches"),
    "a branch after none": ("level_branches", [0, -1, 1, 2, -1, -1], "-1 for each unused one"),
    "an unknown branch": ("level_branches", [0, 1, -1, 3, -1, -1], "out of 3 maps, got 3"),
    "a negative branch": ("level_branches", [0, 1, -1, -2, -1, -1], "out of 3 maps, got -2"),
    "a branch used twice": ("level_branches", [0, 1, -1, 1, -1, -1], "in exactly one level"),
    "a branch without pixels": (
        "branch_sizes", [2, 3, 0, 2, 4, 2], "branch of pixels for a level of 2x3",
    ),
    "an unknown mode": ("up_mode", 2, "an upsampling mode from 0 to 1, got 2"),
    "negative images": ("images", -1, "expected images from 0"),
}  # fmt: skip


def bad_call(*tensors: Tensor, images: int = 2, **tables: Any) -> None:
    torch.ops.dyhead.fuse_branches_fwd(*tensors, images, **{**GOOD, **tables})


def good_tensors() -> list[Tensor]:
    return [
        torch.randn(28, 4),
        torch.randn(3, 2, 4),
        torch.randn(2, 2, 4),
        torch.randn(2, 2, 4, 4),
    ]


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_raise(name: str) -> None:
    argument, value, message = BAD_TABLES[name]
    tensors, good = good_tensors(), {"images": 2, **GOOD}
    out = torch.ops.dyhead.fuse_branches_fwd(*tensors, **good)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.fuse_branches_fwd(*tensors, **{**good, argument: value})
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.fuse_branches_bwd(out, *tensors, **{**good, argument: value}, wanted=ALL)


@pytest.mark.parametrize("position", range(4))
def test_bad_tensors_raise(position: int) -> None:
    names = ("y", "scale", "shift", "coefficients")
    tensors = good_tensors()
    good = tensors[position]
    for bad in (good.unsqueeze(0), good.double(), good.mT.contiguous().mT):
        tensors[position] = bad
        with pytest.raises(RuntimeError, match=r"expected .*(y|scale|shift|coefficients) ?"):
            bad_call(*tensors)
    tensors[position] = good[..., :3].contiguous()
    with pytest.raises(
        RuntimeError, match=f"expected {'scale' if position == 0 else names[position]}"
    ):
        bad_call(*tensors)


def test_a_bad_number_of_images_or_gradient_raises() -> None:
    tensors = good_tensors()
    for images in (-1, 0, 1, 3):
        with pytest.raises(RuntimeError, match=r"expected (images|branch maps)"):
            bad_call(*tensors, images=images)
    for bad in (torch.randn(23, 4), torch.randn(24, 3), torch.randn(24, 4).double()):
        with pytest.raises(RuntimeError, match="expected grad_out"):
            torch.ops.dyhead.fuse_branches_bwd(bad, *tensors, 2, **GOOD, wanted=ALL)
    with pytest.raises(RuntimeError, match="at least one channel"):
        bad_call(*(t[..., :0] for t in tensors))

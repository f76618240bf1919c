"""The CUDA fuse_branches, compiled for the host, against its formula in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyhead_cuda.ops.jobs import map_rows
from tests.helpers.compare import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    gradients,
    leaf,
    random_like,
)
from tests.helpers.fuse_cases import CASES, RANDOM_CASES, Case, Size, block_case
from tests.helpers.inputs import halving_sizes

from .arithmetic import dtypes
from .arrays import flat_array, name_of, to_array, to_tensor
from .wanted import assert_only_wanted


@dataclass(frozen=True)
class Operator:
    """The emulated operator. Rows, gradients and results start `skew` elements off alignment."""

    simt: Any
    skew: int = 0
    # log2 of a patch's width and height, most blocks, most images at once
    tiling: tuple[int, ...] | None = None

    def call(self, case: Case, tensors: Sequence[Tensor]) -> Any:
        y, *parameters = tensors
        fuse = self.simt.fuse_branches
        images, *tables = case.tables()
        return fuse.Call(
            name_of(y.dtype),
            images,
            case.channels,
            *tables,
            flat_array(y, self.skew),
            *map(to_array, parameters),
            skew=self.skew,
            tiling=self.tiling and fuse.Tiling(*self.tiling),
        )

    def forward(self, case: Case, tensors: Sequence[Tensor]) -> Tensor:
        return self._rows(self.call(case, tensors).forward(), tensors[0])

    def backward(
        self,
        case: Case,
        tensors: Sequence[Tensor],
        grad_out: Tensor,
        wanted: Sequence[int] = (1, 1, 1, 1),
    ) -> list[Any]:
        """The gradients of y, scale, shift and coefficients; None for what is not wanted."""
        y = tensors[0]
        given = flat_array(grad_out.to(y.dtype), self.skew)
        results = self.call(case, tensors).backward(given, list(wanted))
        grad_y, *others = results.values()
        return [
            None if grad_y is None else self._rows(grad_y, y),
            *(None if array is None else to_tensor(array, y.dtype) for array in others),
        ]

    def _rows(self, array: Any, like: Tensor) -> Tensor:
        flat = to_tensor(array, like.dtype)
        assert flat[: self.skew].isnan().all(), "written before the first row"
        return flat[self.skew :].view(-1, like.shape[1])


def check(operator: Operator, case: Case, dtype: torch.dtype = torch.float64) -> None:
    """Result and all gradients against the formula in float64."""
    tensors = case.tensors(dtype)
    exact = [leaf(t, torch.float64) for t in tensors]
    expected = case.reference(exact)
    out = operator.forward(case, tensors)
    assert out.dtype == dtype
    assert_close(out, expected, dtype)
    cotangent = case.cotangent(exact, dtype)
    grads = operator.backward(case, tensors, cotangent)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    if case.images > 0:
        assert_gradients_close(grads, torch.autograd.grad(expected, exact, cotangent), dtype)


# --- how the work is split ----------------------------------------------------------------------


@given(channels=st.integers(1, 5000))
def test_patches_suit_the_channels(simt: Any, channels: int) -> None:
    for tiling in (
        simt.fuse_branches.fwd_tiling(channels),
        simt.fuse_branches.bwd_tiling(channels),
    ):
        assert tiling.height_log2 <= tiling.width_log2 <= min(5, tiling.height_log2 + 1)
        pixels = 1 << (tiling.width_log2 + tiling.height_log2)
        assert 64 <= pixels <= 1024
        assert pixels * channels < 32768 or pixels == 64
        assert pixels * channels >= 16384 or pixels == 1024


# --- against the formula ------------------------------------------------------------------------


@dtypes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", CASES)
def test_cases(simt: Any, name: str, dtype: torch.dtype) -> None:
    check(Operator(simt), CASES[name], dtype)


@dtypes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    # whole 16-byte vectors; lanes of a power of two and more; several passes of a block over a row
    "channels",
    [8, 24, 64, 136, 520],
)
def test_channels(simt: Any, channels: int, dtype: torch.dtype) -> None:
    case = block_case(halving_sizes(6, 9, 2), images=1, channels=channels)
    check(Operator(simt), case, dtype)


def test_more_vectors_than_threads(simt: Any) -> None:
    check(Operator(simt), block_case([(2, 3), (1, 2)], images=1, channels=1040))
    check(Operator(simt), block_case([(2, 3), (1, 2)], images=1, channels=1041), torch.float32)


@dtypes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    "tiling", [(0, 0, 3), (2, 1, 1, 1), (1, 1, 30), (1, 2, 2), (5, 5, 1, 1)], ids=str
)
def test_tilings(simt: Any, tiling: tuple[int, ...], dtype: torch.dtype) -> None:
    # Patches that maps do not fill, several of them for a block, blocks with different numbers;
    # images one after the other.
    for case in (
        block_case(halving_sizes(13, 10, 3), channels=16),
        replace(CASES["three upsampled"], channels=24),
        replace(CASES["smaller levels"], channels=8),
    ):
        check(Operator(simt, tiling=tiling), case, dtype)


@dtypes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("skew", [1, 3])
def test_unaligned_rows(simt: Any, skew: int, dtype: torch.dtype) -> None:
    check(Operator(simt, skew), block_case(halving_sizes(9, 7, 2), channels=16), dtype)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("count", [-1, 0, 1, 17])
def test_more_levels_than_a_launch_takes(simt: Any, count: int) -> None:
    count += simt.fuse_branches.levels_per_launch
    levels = [((i % 4 + 1, 3), ((2, 2), (i % 4 + 1, 3))[: i % 2 + 1]) for i in range(count)]
    check(Operator(simt), Case(tuple(levels), channels=4))


@settings(max_examples=40)
@given(
    case=RANDOM_CASES,
    dtype=st.sampled_from(list(TOLERANCE)),
    skew=st.integers(0, 1),
    tiling=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4)),
)
@example(Case((((7, 5), ((4, 3), (7, 5))),), images=0), torch.float32, 0, None)
def test_random_cases(
    simt: Any, case: Case, dtype: torch.dtype, skew: int, tiling: tuple[int, ...] | None
) -> None:
    simt.set_seed(case.seed)
    check(Operator(simt, skew, tiling), case, dtype)


@pytest.mark.parametrize("empty", [(0, 4), (4, 0), (0, 0)])
def test_levels_without_pixels(simt: Any, empty: Size) -> None:
    full: tuple[Size, tuple[Size, ...]] = ((5, 4), ((5, 4), (3, 2)))
    case = Case((full, (empty, (empty, (3, 2))), full))
    check(Operator(simt), case)
    tensors = case.tensors()
    grad_out = random_like(case.reference(tensors))[0]
    grad_y, grad_scale, grad_shift, grad_coefficients = Operator(simt).backward(
        case, tensors, grad_out
    )
    for zero in (
        grad_y.split(map_rows(case.plan()["branches"], case.images))[3],
        grad_scale[2:4],
        grad_shift[1],
        grad_coefficients[1],
    ):
        assert zero.numel() > 0
        assert (zero == 0).all()


# --- special values -----------------------------------------------------------------------------


@dtypes
def test_a_tie_is_split(simt: Any, dtype: torch.dtype) -> None:
    case = block_case(halving_sizes(9, 7, 2), channels=8)
    tensors = [t.detach() for t in case.tensors(dtype)]
    tensors[3][:, :, 2:] = tensors[3][:, :, :2]
    exact = [leaf(t, torch.float64) for t in tensors]
    expected = case.reference(exact)
    grads = Operator(simt).backward(case, tensors, random_like(expected)[0])
    assert_gradients_close(grads, gradients(expected, exact, dtype), dtype)
    assert torch.equal(grads[3][:, :, :2], grads[3][:, :, 2:])


@dtypes
def test_non_finite_values_come_through(simt: Any, dtype: torch.dtype) -> None:
    case = block_case(halving_sizes(9, 14, 2), channels=24)
    tensors = [t.detach() for t in case.tensors(dtype)]
    tensors[0][::11, 3], tensors[0][5, 7:] = math.nan, math.inf
    expected = case.reference(tensors)
    out = Operator(simt).forward(case, tensors)
    assert 0 < expected.isnan().sum() < expected.numel()
    assert torch.equal(out.isnan(), expected.isnan())
    for value in (math.inf, -math.inf):
        assert torch.equal(out == value, expected == value)
    # Nothing is indexed by a value.
    Operator(simt).backward(case, tensors, expected)


def test_small_gradients_in_float16_are_kept(simt: Any) -> None:
    # g_z is of the order 1e-7, where float16 has one digit; scales bring grad_y back to 1e-4.
    case = Case((((8, 8), ((4, 4),)),), channels=8)
    tensors = [t.detach() for t in case.tensors(torch.float16)]
    tensors[1] *= 1000
    tensors[3] *= 1e-3
    exact = [leaf(t, torch.float64) for t in tensors]
    expected = case.reference(exact)
    grad_out = 1e-4 * random_like(expected)[0].half()
    wanted = torch.autograd.grad(expected, exact, grad_out.double())
    grads = Operator(simt).backward(case, tensors, grad_out)
    assert_close(grads[0], wanted[0], torch.float16, factor=2)


# --- gradients of the emulated forward itself -----------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [block_case([(3, 2), (2, 1)]), CASES["from and to 1x1"], Case((((2, 3), ((5, 4),)),))],
    ids=["block", "from and to 1x1", "smaller level"],
)
def test_gradcheck(simt: Any, case: Case) -> None:
    case = replace(case, channels=1, images=1)
    operator = Operator(simt)
    tensors = [t.detach() for t in case.tensors()]
    grad_out = random_like(case.reference(tensors))[0]
    step = 1e-6
    for t, gradient in zip(tensors, operator.backward(case, tensors, grad_out), strict=True):
        flat = t.view(-1)
        for i in range(t.numel()):
            values = []
            for signed_step in (step, -step):
                before = float(flat[i])
                flat[i] += signed_step
                values.append((operator.forward(case, tensors) * grad_out).sum())
                flat[i] = before
            numeric = float(values[0] - values[1]) / (2 * step)
            assert float(gradient.view(-1)[i]) == pytest.approx(numeric, rel=1e-6, abs=1e-8)


# --- what is not wanted --------------------------------------------------------------------------


@dtypes
@pytest.mark.usefixtures("seed")
def test_only_what_is_wanted(simt: Any, dtype: torch.dtype) -> None:
    for case in (
        block_case(halving_sizes(9, 7, 3), channels=16),
        replace(CASES["three upsampled"], channels=9),
    ):
        tensors = case.tensors(dtype)
        grad_out = random_like(case.reference(tensors))[0]
        operator = Operator(simt, tiling=(2, 1, 3))
        assert_only_wanted(partial(operator.backward, case, tensors, grad_out), 4)


# --- determinism --------------------------------------------------------------------------------


@dtypes
def test_every_order_gives_the_same_bits(simt: Any, dtype: torch.dtype) -> None:
    case = block_case(halving_sizes(25, 19, 3), channels=40)
    tensors = case.tensors(dtype)
    grad_out = random_like(case.reference(tensors))[0]
    operator = Operator(simt, tiling=(3, 2, 5))

    def run(seed: int) -> list[Tensor]:
        simt.set_seed(seed)
        return [
            operator.forward(case, tensors),
            *operator.backward(case, tensors, grad_out),
        ]

    first = run(0)
    for seed in range(1, 5):
        for a, b in zip(run(seed), first, strict=True):
            assert torch.equal(a, b)

"""``dyhead::deform_conv`` on the CPU called with tables and tensors that do not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dyhead_cuda import library
from dyhead_cuda.ops.jobs import ReadRule
from tests.helpers.deform_work import Work
from tests.helpers.paths import ROOT

library.require("cpu")

Tables = tuple[list[int], list[int], list[int], list[int]]
Changes = dict[tuple[int, int | None], int]

GEOMETRY, SOURCES, TERMS, JOBS = range(4)
HUGE = 2**31 - 1
# name: table, index of a value (or None: the last one is cut off), new value, message
BAD_TABLES: dict[str, tuple[int, int | None, int, str]] = {
    "a geometry cut off": (GEOMETRY, None, 0, "expected a geometry of 9 integers, got 8"),
    "a source cut off": (SOURCES, None, 0, "expected sources of 3 n integers"),
    "a term cut off": (TERMS, None, 0, "expected terms of 2 n integers"),
    "a job cut off": (JOBS, None, 0, "expected jobs of 15 n integers"),
    "images that overflow": (GEOMETRY, 0, 2**61, "expected"),
    "negative images": (GEOMETRY, 0, -1, "expected"),
    "another kernel": (GEOMETRY, 3, 1, "expected"),
    "a kernel beyond 32 bits": (GEOMETRY, 3, 2**32 + 3, "expected"),
    "no groups": (GEOMETRY, 1, 0, "expected"),
    "groups that do not divide": (GEOMETRY, 1, 3, "expected"),
    "deformable groups that do not divide": (GEOMETRY, 2, 3, "expected"),
    "a gap between sources": (SOURCES, 3, 25, "expected"),
    "a source of too many rows": (SOURCES, -1, 4, "expected"),
    "a source of too few rows": (SOURCES, -1, 2, "expected"),
    "a source beyond 32 bits": (SOURCES, -1, 2**32 + 3, "expected"),
    "an unknown source": (TERMS, 0, 4, "expected"),
    "a negative source": (TERMS, 0, -1, "expected"),
    "an unknown weight": (TERMS, 1, 5, "expected"),
    "a negative weight": (TERMS, 1, -1, "expected"),
    "a gap between outputs": (JOBS, 15, 25, "expected"),
    "a negative output": (JOBS, 1, -3, "expected"),
    "an output that overflows": (JOBS, 1, HUGE, "expected"),
    "predictions that do not fit": (JOBS, 4, 2, "expected"),
    "predictions beyond the rows": (JOBS, 48, 25, "expected"),
    "predictions before the rows": (JOBS, 48, -1, "expected"),
    "an unknown offset rule": (JOBS, 6, 4, "expected"),
    "an unknown mask rule": (JOBS, 7, -1, "expected"),
    "a mask without offsets": (JOBS, 6, ReadRule.NONE, "expected"),
    "offsets without a mask": (JOBS, 7, ReadRule.NONE, "expected"),
    "no stride": (JOBS, 8, 0, "expected"),
    "a negative first term": (JOBS, 10, -1, "expected"),
    "a first term beyond the list": (JOBS, 10, 9, "expected"),
    "a first term beyond 32 bits": (JOBS, 10, 2**32, "expected"),
    "too many terms": (JOBS, 11, 10, "expected"),
    "no terms": (JOBS, 11, 0, "expected"),
    "no upsampled size": (JOBS, 12, 0, "expected"),
    "an unknown upsampling mode": (JOBS, 14, 2, "expected an upsampling mode from 0 to 1, got 2"),
}


def raises_in_both_directions(work: Work, tables: Tables, message: str) -> None:
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    forward, backward = [*work.arguments(tensors)], [*work.backward_arguments(tensors)]
    forward[5:9], backward[10:14] = tables, tables
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.deform_conv_fwd(*forward)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.deform_conv_bwd(*backward)


def changed(tables: Tables, changes: Changes) -> Tables:
    new = [list(table) for table in tables]
    for (table, index), value in changes.items():
        if index is None:
            new[table].pop()
        else:
            new[table][index] = value
    return new[0], new[1], new[2], new[3]


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_raise(name: str) -> None:
    table, index, value, message = BAD_TABLES[name]
    tables = changed(Work().plan.tables, {(table, index): value})
    raises_in_both_directions(Work(), tables, message)


@pytest.mark.parametrize("rule", [ReadRule.CROP, ReadRule.FLAT])
def test_predictions_that_overflow_raise(rule: int) -> None:
    # 4 (2^31 - 1)^2 is negative in 64 bits.
    work = Work(images=4)
    size: Changes = {(JOBS, 4): HUGE, (JOBS, 5): HUGE, (JOBS, 6): rule, (JOBS, 7): rule}
    raises_in_both_directions(work, changed(work.plan.tables, size), "expected")


def test_predictions_that_overlap_raise() -> None:
    # They would be written by two tasks at once.
    shifted: Changes = {(JOBS, 15 + 3): 3, (JOBS, 15 + 4): 2, (JOBS, 15 + 5): 2}
    raises_in_both_directions(Work(), changed(Work().plan.tables, shifted), "expected")


def spoilt(argument: Tensor | list[Tensor], *, columns: bool = False) -> Iterator[Any]:
    """A tensor, or the last of a list, of wrong shapes, strides and types."""
    if isinstance(argument, list):
        for bad in spoilt(argument[-1], columns=columns):
            yield [*argument[:-1], bad]
        yield argument[:-1]
        return
    yield argument.unsqueeze(0)
    yield (argument[..., :-1] if columns else argument[:-1]).contiguous()
    yield torch.stack([argument, argument], -1)[..., 0]
    yield argument.long()
    yield argument.double()


@pytest.mark.parametrize("place", range(5))
def test_bad_tensors_raise(place: int) -> None:
    work = Work()
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    arguments = work.arguments(tensors)
    for bad in spoilt(arguments[place]):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.dyhead.deform_conv_fwd(*arguments[:place], bad, *arguments[place + 1 :])


@pytest.mark.parametrize("place", range(10))
def test_bad_tensors_raise_in_the_backward(place: int) -> None:
    work = Work()
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    arguments = work.backward_arguments(tensors)
    for bad in spoilt(arguments[place], columns=True):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.dyhead.deform_conv_bwd(*arguments[:place], bad, *arguments[place + 1 :])


def test_the_backward_needs_all_gradients_of_moments_or_none() -> None:
    arguments = Work().backward_arguments(Work().tensors())
    for place in (1, 2, 3):
        with pytest.raises(RuntimeError, match="all three moments, or of none"):
            torch.ops.dyhead.deform_conv_bwd(*arguments[:place], None, *arguments[place + 1 :])


def test_moments_of_wide_rows_are_refused() -> None:
    with pytest.raises(RuntimeError, match="expected moments of an output of the source's type"):
        Work(out_in_compute_dtype=True).run(Work().tensors())


ODD_VALUES = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 12, 24, 26, 40, HUGE, 2**31]
ODD_VALUES += [2**32, 2**32 + 1, 2**32 + 3, 2**61, 2**62, 2**63 - 1]


@settings(max_examples=200, deadline=None)
@given(
    images=st.integers(1, 4),
    changes=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 55), st.sampled_from(ODD_VALUES)),
        min_size=1,
        max_size=4,
    ),
)
def fuzz_tables(images: int, changes: list[tuple[int, int, int]]) -> None:
    """Any table raises, or gives finite results of the size that the fake kernel promises."""
    work = Work(images=images)
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    lengths = [len(table) for table in work.plan.tables]
    tables = changed(work.plan.tables, {(t, i % lengths[t]): v for t, i, v in changes})
    print(images, tables, flush=True)  # the last line names what crashed
    forward, backward = [*work.arguments(tensors)], [*work.backward_arguments(tensors)]
    forward[5:9], backward[10:14] = tables, tables
    fuzz_call(torch.ops.dyhead.deform_conv_fwd, forward)
    fuzz_call(torch.ops.dyhead.deform_conv_bwd, backward)


def fuzz_call(operator: Any, arguments: Sequence[Any]) -> None:
    try:
        results = operator(*arguments)
    except RuntimeError as error:
        if "expected" not in str(error):
            raise
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [t.shape for t in operator(*arguments)]
    assert [t.shape for t in results] == shapes
    assert all(t.isfinite().all() for t in results)


def test_any_table_raises_or_gives_finite_results() -> None:
    program = "from tests.ops.test_deform_tables import fuzz_tables; fuzz_tables()"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert run.stdout.count("\n") > 100

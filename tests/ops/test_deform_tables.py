"""``dyhead::deform_conv`` on the CPU called with tables and tensors that do not fit."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dyhead_cuda import library
from dyhead_cuda.ops.jobs import JOB_FIELDS, DeformTables, ReadRule
from tests.helpers.deform_work import Work
from tests.helpers.paths import ROOT

library.require("cpu")

Changes = dict[tuple[str, int | None], int]

HUGE = 2**31 - 1
FIELDS = len(JOB_FIELDS)
# name: table, index of a value (or None: the last one is cut off), new value, message
BAD_TABLES: dict[str, tuple[str, int | None, int, str]] = {
    "a geometry cut off": ("geometry", None, 0, "expected a geometry of 8 integers, got 7"),
    "a source cut off": ("source_sizes", None, 0, "expected source sizes of 2 n integers"),
    "a prediction cut off": ("prediction_sizes", None, 0, "prediction sizes of 2 n integers"),
    "an output cut off": ("out_sizes", None, 0, "expected output sizes of 2 n integers"),
    "an upsampled size cut off": ("up_sizes", None, 0, "upsampled sizes of 2 n integers"),
    "a term cut off": ("terms", None, 0, "expected terms of 2 n integers"),
    "a job cut off": ("jobs", None, 0, "expected jobs of 8 n integers"),
    "images that overflow": ("images", 0, 2**61, "expected images from 0"),
    "negative images": ("images", 0, -1, "expected images from 0"),
    "another kernel": ("geometry", 2, 1, "expected"),
    "a kernel beyond 32 bits": ("geometry", 2, 2**32 + 3, "expected"),
    "no groups": ("geometry", 0, 0, "expected"),
    "groups that do not divide": ("geometry", 0, 3, "expected"),
    "deformable groups that do not divide": ("geometry", 1, 3, "expected"),
    "a source of too many rows": ("source_sizes", -1, 4, "source maps within"),
    "a source of too few rows": ("source_sizes", -1, 2, "source maps that cover all"),
    "a source beyond 32 bits": ("source_sizes", -1, 2**32 + 3, "the width of a map"),
    "an unknown source": ("terms", 0, 4, "expected terms of 4 sources"),
    "a negative source": ("terms", 0, -1, "expected terms of 4 sources"),
    "an unknown weight": ("terms", 1, 5, "expected terms of 4 sources and 5 weights"),
    "a negative weight": ("terms", 1, -1, "expected terms of 4 sources and 5 weights"),
    "a negative output": ("out_sizes", 1, -3, "the width of a map"),
    "an output that overflows": ("out_sizes", 1, HUGE, "expected"),
    "predictions of too few rows": ("prediction_sizes", 0, 2, "prediction maps that cover all"),
    "predictions of too many rows": ("prediction_sizes", 0, 4, "prediction maps within"),
    "predictions that do not fit": ("jobs", 0, 1, "predictions that a map of 3x4 can read"),
    "an unknown prediction": ("jobs", 0, 2, "expected a prediction map out of 2"),
    "a negative prediction": ("jobs", 0, -1, "expected a prediction map out of 2"),
    "predictions of a plain convolution": ("jobs", 4 * FIELDS, 0, "-1 for a plain convolution"),
    "an unknown offset rule": ("jobs", 1, 4, "expected offset_rule"),
    "an unknown mask rule": ("jobs", 2, -1, "expected mask_rule"),
    "a mask without offsets": ("jobs", 1, ReadRule.NONE, "expected"),
    "offsets without a mask": ("jobs", 2, ReadRule.NONE, "expected"),
    "no stride": ("jobs", 3, 0, "expected stride_h"),
    "a negative first term": ("jobs", 5, -1, "expected first_term"),
    "a first term beyond the list": ("jobs", 5, 9, "expected terms within the list"),
    "a first term beyond 32 bits": ("jobs", 5, 2**32, "expected first_term"),
    "too many terms": ("jobs", 6, 10, "expected terms within the list"),
    "no terms": ("jobs", 6, 0, "expected terms from 1"),
    "a negative upsampled size": ("up_sizes", 0, -1, "the height of a map"),
    "an upsampled size that is too large": ("up_sizes", 0, 2**21, "the height after upsampling"),
    "an unknown upsampling mode": ("jobs", 7, 2, "expected an upsampling mode from 0 to 1, got 2"),
}


def raises_in_both_directions(work: Work, tables: DeformTables, message: str) -> None:
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    forward, backward = with_tables(work, tensors, tables)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.deform_conv_fwd(*forward)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.deform_conv_bwd(*backward)


def with_tables(
    work: Work, tensors: dict[str, Tensor], tables: DeformTables
) -> tuple[list[Any], list[Any]]:
    """The arguments of both directions, with other tables."""
    forward, backward = [*work.arguments(tensors)], [*work.backward_arguments(tensors)]
    forward[5 : 5 + len(tables)] = tables
    backward[10 : 10 + len(tables)] = tables
    return forward, backward


def changed(tables: DeformTables, changes: Changes) -> DeformTables:
    new = {
        name: [value] if name == "images" else [*value] for name, value in tables._asdict().items()
    }
    for (table, index), value in changes.items():
        if index is None:
            new[table].pop()
        else:
            new[table][index] = value
    return DeformTables(new.pop("images")[0], **new)


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_raise(name: str) -> None:
    table, index, value, message = BAD_TABLES[name]
    tables = changed(Work().plan.tables, {(table, index): value})
    raises_in_both_directions(Work(), tables, message)


@pytest.mark.parametrize("rule", [ReadRule.CROP, ReadRule.FLAT])
def test_predictions_that_overflow_raise(rule: int) -> None:
    # 4 (2^31 - 1)^2 is negative in 64 bits.
    work = Work(images=4)
    size: Changes = {("prediction_sizes", 0): HUGE, ("prediction_sizes", 1): HUGE}
    rules: Changes = {("jobs", 1): rule, ("jobs", 2): rule}
    raises_in_both_directions(work, changed(work.plan.tables, {**size, **rules}), "expected")


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
        st.tuples(
            st.sampled_from(DeformTables._fields), st.integers(0, 39), st.sampled_from(ODD_VALUES)
        ),
        min_size=1,
        max_size=4,
    ),
)
def fuzz_tables(images: int, changes: list[tuple[str, int, int]]) -> None:
    """Any table raises, or gives finite results of the size that the fake kernel promises."""
    work = Work(images=images)
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    plain = work.plan.tables
    lengths = {
        "images": 1,
        **{name: len(t) for name, t in plain._asdict().items() if name != "images"},
    }
    tables = changed(plain, {(t, i % lengths[t]): v for t, i, v in changes})
    print(images, tables, flush=True)  # the last line names what crashed
    forward, backward = with_tables(work, tensors, tables)
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


@pytest.mark.parametrize(("images", "height", "width"), [(0, HUGE, 1), (1, HUGE, 0), (HUGE, 0, 1)])
def test_huge_sizes_of_no_pixels_take_no_time(images: int, height: int, width: int) -> None:
    size = [min(height, HUGE - 9), width]  # so that the taps' positions fit 32 bits
    source, predictions, weights = torch.ones(0, 4), torch.ones(0, 27), [torch.ones(8, 4, 3, 3)]
    moments = images < HUGE
    tables = (
        images, size, size, size, [1, 1], [1, 1, 3, 3, 1, 1, 1, 1], [0, 0],
        [0, 0, 0, 1, 1, 0, 1, 0], True, False,
    )  # fmt: skip
    start = time.process_time()
    out, mean, *_ = torch.ops.dyhead.deform_conv_fwd(
        source, predictions, weights, None, None, *tables, moments, False
    )
    grads = [torch.ones_like(mean) if moments else None] * 3
    _, _, grad_weights, grad_bias, _ = torch.ops.dyhead.deform_conv_bwd(
        out, *grads, source, predictions, weights, None, out, mean, *tables, [1] * 4 + [0], False,
        False,
    )  # fmt: skip
    assert time.process_time() - start < 1, "a loop over 2^31 rows takes several seconds"
    assert out.shape == (0, 8)
    assert grad_weights.eq(0).all()
    assert grad_bias.eq(0).all()

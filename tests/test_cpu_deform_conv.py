"""The CPU kernels of deformable convolution against the reference, and the operator itself."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.functional import interpolate, pad

from dyhead_cuda import backend, functional, library, reference
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.deform_conv import (
    CROP,
    FLAT,
    NO_MAP,
    NONE,
    SAME,
    Job,
    Map,
    Plan,
    deform_conv,
    stack_maps,
)
from tests.conftest import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    gradients,
    leaf,
)
from tests.test_deform_conv import EXTREME, LAYOUTS, Case, pairs

library.require("cpu")

Tables = tuple[list[int], list[int], list[int], list[int]]

# Channels on both sides of every vector's width and of the slices of the backward.
CHANNELS = [1, 3, 17, 40, 70]


def on_cpu(**arguments: object) -> Tensor:
    with backend("cpu"):
        return functional.modulated_deform_conv2d(**arguments)  # type: ignore[arg-type]


def check(case: Case, dtype: torch.dtype = torch.float64) -> None:
    tensors = case.tensors(dtype)
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    actual = case.run(on_cpu, tensors)
    expected = case.run(reference.modulated_deform_conv2d, exact)
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_close(actual, expected, dtype)
    actual_grads = gradients(actual, list(tensors.values()), dtype)
    expected_grads = gradients(expected, list(exact.values()), dtype)
    assert [g.dtype for g in actual_grads] == [dtype] * len(tensors)
    assert_close(actual_grads, expected_grads, dtype, factor=2)


# --- the plain convolution ------------------------------------------------------------------------

RANDOM_CASES = st.builds(
    Case,
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    deform_groups=st.integers(1, 3),
    in_multiple=st.sampled_from([1, 2, 5, 17, 33]),
    out_multiple=st.sampled_from([1, 2, 5, 17, 33]),
    kernel=pairs(1, 4),
    stride=pairs(1, 3),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
    margin=pairs(0, 6),
    mask=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=60)
@given(RANDOM_CASES)
@example(Case())
@example(Case(groups=2, deform_groups=3, kernel=(1, 3), stride=(2, 1), dilation=(1, 2)))
@example(Case(padding=(0, 2), mask=False, bias=False))
def test_equals_the_reference_with_all_gradients(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_and_more_than_one_chunk(channels: int, dtype: torch.dtype) -> None:
    # 15 x 21 pixels are two chunks of 144 and a rest.
    case = Case(in_multiple=channels, out_multiple=channels + 1, margin=(14, 20))
    check(case, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("groups", "deform_groups"), [(1, 70), (70, 1), (7, 2), (2, 7), (3, 3)])
def test_groups_in_every_type(groups: int, deform_groups: int, dtype: torch.dtype) -> None:
    check(Case(groups=groups, deform_groups=deform_groups, in_multiple=5, margin=(9, 7)), dtype)


def test_a_large_map_keeps_the_precision_of_float32() -> None:
    check(Case(batch=1, in_multiple=12, out_multiple=8, margin=(90, 120)), torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_integer_coordinates_up_to_the_borders(dtype: torch.dtype) -> None:
    case = Case(batch=1, in_multiple=20, margin=(3, 4))
    tensors = case.tensors(dtype)
    with torch.no_grad():
        tensors["offset"].floor_()  # exactly -1, 0, H - 1 and H among the coordinates
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    actual = case.run(on_cpu, tensors)
    expected = case.run(reference.modulated_deform_conv2d, exact)
    assert_close(actual, expected, dtype)
    assert_close(
        gradients(actual, list(tensors.values()), dtype),
        gradients(expected, list(exact.values()), dtype),
        dtype,
        factor=2,
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("coordinate", "inside"), [(-1, False), (-1 + 1e-9, True), (4, False), (4 - 1e-9, True)]
)
def test_exactly_minus_one_is_outside(axis: int, coordinate: float, inside: bool) -> None:
    image = torch.randn(1, 20, 4, 4, dtype=torch.float64)
    weight = torch.ones(1, 20, 1, 1, dtype=torch.float64)
    offset = torch.full((1, 2, 4, 4), 0.25, dtype=torch.float64)
    offset[0, axis, 0, 0] = coordinate
    offset.requires_grad_()
    out = on_cpu(input=image, offset=offset, weight=weight)[0, 0, 0, 0]
    (grad,) = torch.autograd.grad(out, offset)
    assert bool(out != 0) == inside
    assert bool(grad[0, axis, 0, 0] != 0) == inside
    assert abs(out) < 1e-7


@pytest.mark.parametrize("value", EXTREME)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_extreme_offsets_sample_zero(value: float, dtype: torch.dtype) -> None:
    case = Case(deform_groups=2, in_multiple=10)
    tensors = case.tensors(dtype)
    bad = torch.rand(tensors["offset"].shape) < 0.2
    lost = bad.unflatten(1, (-1, 2)).any(2)
    with torch.no_grad():
        tensors["offset"][bad] = value
        tensors["input"][:, :, 0, 0] = math.inf  # what a lost sample must not read either
        tensors["offset"][:, :, 0] += 100
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    actual = case.run(on_cpu, tensors)
    expected = case.run(reference.modulated_deform_conv2d, exact)
    finite = expected.isfinite()
    assert 0 < finite.sum() < finite.numel()
    assert torch.equal(actual.isfinite(), finite)
    assert_close(actual[finite], expected[finite], dtype)
    grads = dict(zip(tensors, gradients(actual[finite], list(tensors.values())), strict=True))
    both = lost.repeat_interleave(2, dim=1)
    assert (grads["offset"][both] == 0).all()
    assert (grads["mask"][lost] == 0).all()
    assert grads["input"].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_that_are_not_sampled_do_not_matter(dtype: torch.dtype) -> None:
    case = Case(batch=1, in_multiple=20, margin=(4, 4))
    tensors = case.tensors(dtype)
    with torch.no_grad():
        tensors["input"][0, :, 0, 0], tensors["input"][0, :, -1, -1] = math.inf, math.nan
    for shift in (100.0, -100.0):
        offset = leaf(torch.full_like(tensors["offset"], shift))
        out = case.run(on_cpu, tensors | {"offset": offset})
        assert torch.equal(out, tensors["bias"].view(1, -1, 1, 1).expand_as(out))
        inputs = [tensors["input"], tensors["weight"], tensors["mask"], offset]
        assert all((g == 0).all() for g in gradients(out, inputs))
    exact = {name: t.detach().double() for name, t in tensors.items()}
    expected = case.run(reference.modulated_deform_conv2d, exact)
    actual = case.run(on_cpu, tensors)
    finite = expected.isfinite()
    assert 0 < finite.sum() < finite.numel()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_close(actual[finite], expected[finite], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_infinity_stays_in_its_group(dtype: torch.dtype) -> None:
    # An odd number of channels in each: none of them may be multiplied with the next group's.
    case = Case(batch=1, groups=3, in_multiple=5)
    tensors = {name: t.detach() for name, t in case.tensors(dtype).items()}
    tensors["input"][:, 5:] = math.inf
    out = case.run(on_cpu, tensors)
    assert out[:, :3].isfinite().all()
    assert not out[:, 3:].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: str) -> None:
    case = Case(deform_groups=2)
    tensors = case.tensors()
    strange = {
        name: leaf(t) if t.dim() == 1 else LAYOUTS[layout](t.detach()).requires_grad_()
        for name, t in tensors.items()
    }
    assert not strange["offset"].is_contiguous()
    expected, actual = case.run(on_cpu, tensors), case.run(on_cpu, strange)
    assert torch.equal(actual, expected)
    for a, b in zip(
        gradients(actual, list(strange.values())),
        gradients(expected, list(tensors.values())),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_expanded_arguments_and_gradients() -> None:
    case = Case()
    per_image = ("input", "offset", "mask")
    tensors = case.tensors()
    shared = {k: leaf(t[:1]) if k in per_image else t for k, t in tensors.items()}
    expanded = {k: t.expand(2, *t.shape[1:]) if k in per_image else t for k, t in shared.items()}
    actual = case.run(on_cpu, expanded)
    expected = case.run(reference.modulated_deform_conv2d, expanded)
    assert_close(actual, expected)
    inputs = list(shared.values())
    assert_close(
        torch.autograd.grad(actual.sum(), inputs),  # of an expanded cotangent too
        torch.autograd.grad(expected.sum(), inputs),
        factor=2,
    )


@pytest.mark.parametrize("mask", [True, False])
def test_empty_batch(mask: bool) -> None:
    case = Case(batch=0, groups=2, deform_groups=2, mask=mask)
    tensors = case.tensors()
    out = case.run(on_cpu, tensors)
    assert out.shape == case.run(reference.modulated_deform_conv2d, tensors).shape
    for t, grad in zip(tensors.values(), gradients(out, list(tensors.values())), strict=True):
        assert grad.shape == t.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_images_without_pixels(size: tuple[int, int], padding: int, dtype: torch.dtype) -> None:
    image = torch.randn(2, 3, *size).to(dtype).requires_grad_()
    out_size = [s + 2 * padding - 2 for s in size]
    offset = torch.randn(2, 18, *out_size).to(dtype).requires_grad_()
    weight = torch.randn(4, 3, 3, 3).to(dtype).requires_grad_()
    bias = torch.randn(4).to(dtype).requires_grad_()
    out = on_cpu(input=image, offset=offset, weight=weight, bias=bias, padding=padding)
    assert out.shape == (2, 4, *out_size)
    assert torch.equal(out, bias.view(1, 4, 1, 1).expand_as(out))
    grads = gradients(out, [image, offset, weight])
    assert all((g == 0).all() for g in grads)


def test_arguments_of_other_types_than_the_input() -> None:
    case = Case()
    kinds = {"offset": torch.float32, "weight": torch.float16, "bias": torch.bfloat16}
    tensors = {name: leaf(t, kinds.get(name, torch.float64)) for name, t in case.tensors().items()}
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    actual = case.run(on_cpu, tensors)
    expected = case.run(reference.modulated_deform_conv2d, exact)
    assert_close(actual, expected)
    grads = gradients(actual, list(tensors.values()))
    assert [g.dtype for g in grads] == [t.dtype for t in tensors.values()]
    for a, b in zip(grads, gradients(expected, list(exact.values())), strict=True):
        assert_close(a, b, a.dtype)


@pytest.mark.parametrize("mask", [True, False])
def test_gradcheck(mask: bool) -> None:
    case = Case(
        batch=2, groups=2, deform_groups=2, in_multiple=1, out_multiple=1, kernel=(1, 2),
        stride=(1, 2), padding=(1, 0), margin=(1, 2), mask=mask,
    )  # fmt: skip
    tensors = case.tensors()

    def run(*values: Tensor) -> Tensor:
        return case.run(on_cpu, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


# --- the operator ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A call of the operator: jobs of several terms, all read rules, gates, bias and moments.

    No job reads source map 2 and weights 3.
    """

    images: int = 2
    channels: int = 2
    out_channels: int = 3
    mask_logits: bool = True
    with_bias: bool = True
    with_gates: bool = True
    moments: bool = True
    scale: int = 1  # of all sizes
    seed: int = 0

    @property
    def plan(self) -> Plan:
        n, s = self.images, self.scale
        sources = stack_maps([(3 * s, 4 * s), (2 * s, 2 * s), (s, s), (2 * s, 3 * s)], n)
        sizes = [(3 * s, 4 * s), (2 * s, 2 * s), (2 * s, 2 * s), (s, 2 * s), (2 * s, 3 * s)]
        outs = stack_maps(sizes, n)
        large, small = stack_maps([(3 * s, 4 * s), (s, 2 * s)], n)
        jobs = [
            Job(outs[0], large, [(0, 0), (1, 1)]),
            Job(outs[1], large, [(1, 2)], (1, 1), FLAT, CROP, (3 * s, 4 * s)),
            Job(outs[2], large, [(0, 0)], (2, 2), CROP, FLAT, (2 * s, 5 * s)),
            Job(outs[3], small, [(3, 1), (0, 2), (3, 1)], (1, 2), SAME, SAME, (1, 1)),
            Job(outs[4], NO_MAP, [(3, 4), (1, 0)], (1, 1), NONE, NONE),
        ]
        return Plan(n, sources, jobs, mask_logits=self.mask_logits)

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        n, plan, compute = self.images, self.plan, compute_dtype(dtype)
        predictions = normal(sum(n * job.predictions.pixels for job in plan.jobs[::3]), 27)
        # Away from integer coordinates, where the derivative jumps.
        predictions[:, :18] = (
            predictions[:, :18].floor() + 0.1 + 0.8 * predictions[:, 18:].repeat(1, 2).sigmoid()
        )
        tensors = {
            "source": normal(sum(n * m.pixels for m in plan.sources), self.channels),
            "predictions": predictions,
            "weights": normal(5, self.out_channels, self.channels, 3, 3) / 3,
        }
        if self.with_bias:
            tensors["bias"] = normal(5, self.out_channels)
        if self.with_gates:
            tensors["gates"] = normal(n, len(plan.sources))
        return {k: leaf(t, dtype if k == "source" else compute) for k, t in tensors.items()}

    def run(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        results = deform_conv(plan=self.plan, moments=self.moments, **tensors)
        return list(results if self.moments else results[:1])

    def arguments(self, tensors: dict[str, Tensor]) -> list[Any]:
        """Of ``deform_conv_fwd``."""
        names = ("source", "predictions", "weights", "bias", "gates")
        plan = self.plan
        return [*map(tensors.get, names), *plan.tables, plan.mask_logits, self.moments]

    def backward_arguments(self, tensors: dict[str, Tensor]) -> list[Any]:
        """Of ``deform_conv_bwd``, with random gradients."""
        plain = {name: t.detach() for name, t in tensors.items()}
        arguments = self.arguments(plain)
        out, mean, *_ = torch.ops.dyhead.deform_conv_fwd(*arguments)
        grads = [torch.randn_like(mean) if self.moments else None for _ in range(3)]
        source, predictions, weights, _, gates, *tables, _ = arguments
        first = [torch.randn_like(out), *grads, source, predictions, weights, gates, out, mean]
        return [*first, *tables, self.with_bias]

    def reference(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """The same in float64: map by map, with the reference's convolution."""
        t = {name: value.double() for name, value in tensors.items()}
        maps, statistics = [], []
        for job in self.plan.jobs:
            size, up = (job.out.height, job.out.width), job.upsampled
            if job.offset_rule == NONE:
                offset = t["source"].new_zeros(self.images, 18, *size)
                mask = t["source"].new_ones(self.images, 9, *size)
            else:
                predictions = self.map(t["predictions"], job.predictions)
                offset = read(predictions[:, :18], size, job.offset_rule)
                mask = read(predictions[:, 18:], size, job.mask_rule)
                mask = mask.sigmoid() if self.mask_logits else mask
            y = t["source"].new_zeros(self.images, self.out_channels, *size)
            for source, weight in job.terms:
                x = self.map(t["source"], self.plan.sources[source])
                if self.with_gates:
                    x = x * t["gates"][:, source].view(-1, 1, 1, 1)
                y = y + convolution_of_size(x, offset, t["weights"][weight], mask, job.stride)
            if self.with_bias:
                y = y + t["bias"][job.terms[0][1]].view(1, -1, 1, 1)
            upsampled = interpolate(y, up or size, mode="bilinear", align_corners=True)
            maps.append(y.permute(0, 2, 3, 1).reshape(-1, self.out_channels))
            statistics.append((y.mean((2, 3)), y.var((2, 3), correction=0), upsampled.mean((2, 3))))
        moments = [torch.stack(values) for values in zip(*statistics, strict=True)]
        return [torch.cat(maps), *(moments if self.moments else [])]

    def map(self, rows: Tensor, m: Map) -> Tensor:
        part = rows[m.first_row :][: self.images * m.pixels]
        return part.view(self.images, m.height, m.width, rows.shape[1]).permute(0, 3, 1, 2)


def read(values: Tensor, size: tuple[int, int], rule: int) -> Tensor:
    height, width = size
    if rule != FLAT:
        return values[:, :, :height, :width]
    n, k = values.shape[:2]
    return values.flatten(1)[:, : k * height * width].reshape(n, k, height, width)


def convolution_of_size(
    x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, stride: tuple[int, int]
) -> Tensor:
    """The reference's convolution, of as many output pixels as there are offsets.

    Zeros below and to the right of x change no sample, and pixels without offsets are cut off.
    """
    size = offset.shape[2:]
    needed = [
        max(have, (out - 1) * step + 1)
        for have, out, step in zip(x.shape[2:], size, stride, strict=True)
    ]
    outs = [(have - 1) // step + 1 for have, step in zip(needed, stride, strict=True)]

    def padded(t: Tensor, to: Sequence[int]) -> Tensor:
        return pad(t, (0, to[1] - t.shape[3], 0, to[0] - t.shape[2]))

    out = reference.modulated_deform_conv2d(
        padded(x, needed), padded(offset, outs), weight, None, stride, 1, 1, padded(mask, outs)
    )
    return out[:, :, : size[0], : size[1]]


WORKS = {
    "all": Work(),
    "without moments": Work(moments=False),
    "without bias and gates": Work(with_bias=False, with_gates=False),
    "plain masks": Work(mask_logits=False, with_gates=False),
    "many channels": Work(channels=70, out_channels=40),
    "several chunks": Work(images=3, channels=5, out_channels=4, scale=9),
    "no images": Work(images=0),
}


def check_work(work: Work, dtype: torch.dtype) -> None:
    tensors = work.tensors(dtype)
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    actual, expected = work.run(tensors), work.reference(exact)
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
@pytest.mark.parametrize("name", ["all", "without moments", "without bias and gates", "no images"])
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


# --- calls that do not fit ------------------------------------------------------------------------

GEOMETRY, SOURCES, TERMS, JOBS = range(4)
HUGE = 2**31 - 1
# name: table, index of a value (or None: the last one is cut off), new value, message
BAD_TABLES: dict[str, tuple[int, int | None, int, str]] = {
    "a geometry cut off": (GEOMETRY, None, 0, "expected tables"),
    "a source cut off": (SOURCES, None, 0, "expected tables"),
    "a term cut off": (TERMS, None, 0, "expected tables"),
    "a job cut off": (JOBS, None, 0, "expected tables"),
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
    "a gap between outputs": (JOBS, 14, 25, "expected"),
    "a negative output": (JOBS, 1, -3, "expected"),
    "an output that overflows": (JOBS, 1, HUGE, "expected"),
    "predictions that do not fit": (JOBS, 4, 2, "expected"),
    "predictions beyond the rows": (JOBS, 45, 25, "expected"),
    "predictions before the rows": (JOBS, 45, -1, "expected"),
    "an unknown offset rule": (JOBS, 6, 4, "expected"),
    "an unknown mask rule": (JOBS, 7, -1, "expected"),
    "a mask without offsets": (JOBS, 6, NONE, "expected"),
    "offsets without a mask": (JOBS, 7, NONE, "expected"),
    "no stride": (JOBS, 8, 0, "expected"),
    "a negative first term": (JOBS, 10, -1, "expected"),
    "a first term beyond the list": (JOBS, 10, 9, "expected"),
    "a first term beyond 32 bits": (JOBS, 10, 2**32, "expected"),
    "too many terms": (JOBS, 11, 10, "expected"),
    "no terms": (JOBS, 11, 0, "expected"),
    "no upsampled size": (JOBS, 12, 0, "expected"),
}


def raises_in_both_directions(work: Work, tables: Tables, message: str) -> None:
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    forward, backward = work.arguments(tensors), work.backward_arguments(tensors)
    forward[5:9], backward[10:14] = tables, tables
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.deform_conv_fwd(*forward)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dyhead.deform_conv_bwd(*backward)


def changed(tables: Tables, changes: dict[tuple[int, int | None], int]) -> Tables:
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


@pytest.mark.parametrize("rule", [CROP, FLAT])
def test_predictions_that_overflow_raise(rule: int) -> None:
    # 4 (2^31 - 1)^2 is negative in 64 bits.
    work = Work(images=4)
    size = {(JOBS, 4): HUGE, (JOBS, 5): HUGE, (JOBS, 6): rule, (JOBS, 7): rule}
    raises_in_both_directions(work, changed(work.plan.tables, size), "expected")


def test_predictions_that_overlap_raise() -> None:
    # They would be written by two tasks at once.
    shifted = {(JOBS, 14 + 3): 3, (JOBS, 14 + 4): 2, (JOBS, 14 + 5): 2}
    raises_in_both_directions(Work(), changed(Work().plan.tables, shifted), "expected")


@pytest.mark.parametrize("place", range(5))
def test_bad_tensors_raise(place: int) -> None:
    work = Work()
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    arguments = work.arguments(tensors)
    good = arguments[place]
    strided = torch.stack([good, good], -1)[..., 0]
    for bad in (good.unsqueeze(0), good[:-1].contiguous(), strided, good.long(), good.half()):
        if place == 0 and bad.dtype == torch.half:
            continue  # rows smaller than the other tensors' type are no fault
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.dyhead.deform_conv_fwd(*arguments[:place], bad, *arguments[place + 1 :])


@pytest.mark.parametrize("place", range(10))
def test_bad_tensors_raise_in_the_backward(place: int) -> None:
    work = Work()
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    arguments = work.backward_arguments(tensors)
    good = arguments[place]
    strided = torch.stack([good, good], -1)[..., 0]
    for bad in (
        good.unsqueeze(0),
        good[..., :-1].contiguous(),
        strided,
        good.long(),
        good.double(),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.dyhead.deform_conv_bwd(*arguments[:place], bad, *arguments[place + 1 :])


def test_the_backward_needs_all_gradients_of_moments_or_none() -> None:
    arguments = Work().backward_arguments(Work().tensors())
    for place in (1, 2, 3):
        with pytest.raises(RuntimeError, match="all three moments, or of none"):
            torch.ops.dyhead.deform_conv_bwd(*arguments[:place], None, *arguments[place + 1 :])


ODD_VALUES = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 12, 24, 26, 40, HUGE, 2**31]
ODD_VALUES += [2**32, 2**32 + 1, 2**32 + 3, 2**61, 2**62, 2**63 - 1]


@settings(max_examples=200)
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
    forward, backward = work.arguments(tensors), work.backward_arguments(tensors)
    forward[5:9], backward[10:14] = tables, tables
    fuzz_call(torch.ops.dyhead.deform_conv_fwd, forward)
    fuzz_call(torch.ops.dyhead.deform_conv_bwd, backward)


def fuzz_call(operator: Any, arguments: list[Any]) -> None:
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
    program = "from tests.test_cpu_deform_conv import fuzz_tables; fuzz_tables()"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert run.stdout.count("\n") > 100

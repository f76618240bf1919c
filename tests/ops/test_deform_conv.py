"""Modulated deformable convolution on the CPU kernels, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyhead_cuda import backend, functional, library, reference
from dyhead_cuda.numerics import output_format
from tests.helpers.compare import TOLERANCE, assert_close, gradients, leaf
from tests.helpers.convolutions import LAYOUTS, PlainConvolution, pairs
from tests.helpers.not_finite import FAR, far

library.require("cpu")


# Channels on both sides of every vector's width and of the slices of the backward.
CHANNELS = [1, 3, 17, 40, 70]


def on_cpu(**arguments: object) -> Tensor:
    with backend("cpu"):
        return functional.modulated_deform_conv2d(**arguments)  # type: ignore[arg-type]


def check(case: PlainConvolution, dtype: torch.dtype = torch.float64) -> None:
    tensors = case.tensors(dtype)
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    actual = case.run(on_cpu, tensors)
    expected = case.run(reference.modulated_deform_conv2d, exact)
    assert actual.dtype == dtype
    memory_format = output_format([tensors["input"]], torch.preserve_format)
    assert actual.is_contiguous(memory_format=memory_format)
    assert_close(actual, expected, dtype)
    actual_grads = gradients(actual, list(tensors.values()), dtype)
    expected_grads = gradients(expected, list(exact.values()), dtype)
    assert [g.dtype for g in actual_grads] == [dtype] * len(tensors)
    assert_close(actual_grads, expected_grads, dtype, factor=2)


# --- the plain convolution ------------------------------------------------------------------------

RANDOM_CASES = st.builds(
    PlainConvolution,
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
@example(PlainConvolution())
@example(PlainConvolution(groups=2, deform_groups=3, kernel=(1, 3), stride=(2, 1), dilation=(1, 2)))
@example(PlainConvolution(padding=(0, 2), mask=False, bias=False))
def test_equals_the_reference_with_all_gradients(case: PlainConvolution) -> None:
    check(case)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_and_more_than_one_chunk(channels: int, dtype: torch.dtype) -> None:
    # 15 x 21 pixels are two chunks of 144 and a rest.
    case = PlainConvolution(in_multiple=channels, out_multiple=channels + 1, margin=(14, 20))
    check(case, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("groups", "deform_groups"), [(1, 70), (70, 1), (7, 2), (2, 7), (3, 3)])
def test_groups_in_every_type(groups: int, deform_groups: int, dtype: torch.dtype) -> None:
    check(
        PlainConvolution(groups=groups, deform_groups=deform_groups, in_multiple=5, margin=(9, 7)),
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_more_channels_than_a_slice_of_the_backward(dtype: torch.dtype) -> None:
    check(PlainConvolution(in_multiple=300, out_multiple=2, margin=(5, 5)), dtype)


def test_more_images_than_the_backward_takes_at_once() -> None:
    # It holds 24 MiB: here 70 slices x 2173 pixels x 9 taps x 3 x 4 bytes an image.
    check(
        PlainConvolution(batch=4, groups=70, in_multiple=1, out_multiple=1, margin=(40, 52)),
        torch.float32,
    )


def test_a_large_map_keeps_the_precision_of_float32() -> None:
    check(
        PlainConvolution(batch=1, in_multiple=12, out_multiple=8, margin=(90, 120)), torch.float32
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_integer_coordinates_up_to_the_borders(dtype: torch.dtype) -> None:
    case = PlainConvolution(batch=1, in_multiple=20, margin=(3, 4))
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


@pytest.mark.parametrize("value", FAR)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_far_offsets_sample_zero(value: float, dtype: torch.dtype) -> None:
    case = PlainConvolution(deform_groups=2, in_multiple=10)
    tensors = case.tensors(dtype)
    bad = torch.rand(tensors["offset"].shape) < 0.2
    lost = bad.unflatten(1, (-1, 2)).any(2)
    with torch.no_grad():
        tensors["offset"][:, :, 0] += 100
        tensors["offset"][bad] = far(value, dtype)
        tensors["input"][:, :, 0, 0] = math.inf  # what a lost sample must not read either
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
    case = PlainConvolution(batch=1, in_multiple=20, margin=(4, 4))
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
    case = PlainConvolution(batch=1, groups=3, in_multiple=5)
    tensors = {name: t.detach() for name, t in case.tensors(dtype).items()}
    tensors["input"][:, 5:] = math.inf
    out = case.run(on_cpu, tensors)
    assert out[:, :3].isfinite().all()
    assert not out[:, 3:].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: str) -> None:
    case = PlainConvolution(deform_groups=2)
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
    case = PlainConvolution()
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
    case = PlainConvolution(batch=0, groups=2, deform_groups=2, mask=mask)
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
    case = PlainConvolution()
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
    case = PlainConvolution(
        batch=2, groups=2, deform_groups=2, in_multiple=1, out_multiple=1, kernel=(1, 2),
        stride=(1, 2), padding=(1, 0), margin=(1, 2), mask=mask,
    )  # fmt: skip
    tensors = case.tensors()

    def run(*values: Tensor) -> Tensor:
        return case.run(on_cpu, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))

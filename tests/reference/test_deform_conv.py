"""The reference's modulated deformable convolution, against torchvision's and by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import deform_conv2d

from dyhead_cuda.reference import modulated_deform_conv2d
from tests.helpers.compare import TOLERANCE, assert_close, gradients, leaf, relative_l2
from tests.helpers.convolutions import LAYOUTS, PlainConvolution, pairs
from tests.helpers.not_finite import FAR, NOT_FINITE, assert_same_finite, far

CASES = st.builds(
    PlainConvolution,
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    deform_groups=st.integers(1, 3),
    in_multiple=st.integers(1, 2),
    out_multiple=st.integers(1, 3),
    kernel=pairs(1, 4),
    stride=pairs(1, 3),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
    margin=pairs(0, 4),
    mask=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=100)
@given(CASES)
@example(PlainConvolution())
@example(PlainConvolution(groups=2, deform_groups=3, kernel=(1, 3), stride=(2, 1), dilation=(1, 2)))
@example(PlainConvolution(padding=(0, 2), mask=False, bias=False))
def test_equals_torchvision_with_all_gradients(case: PlainConvolution) -> None:
    tensors = case.tensors()
    expected = case.run(deform_conv2d, tensors)
    actual = case.run(modulated_deform_conv2d, tensors)
    assert_close(actual, expected)
    inputs = list(tensors.values())
    assert_close(gradients(actual, inputs), gradients(expected, inputs), factor=2)


@pytest.mark.parametrize("padding", [0, 1])
def test_integer_coordinates_use_the_same_one_sided_gradient(padding: int) -> None:
    # With padding 0 no sample is on coordinate -1, where torchvision differs on purpose.
    case = PlainConvolution(padding=(padding, padding), margin=(4, 4))
    tensors = case.tensors()
    with torch.no_grad():
        tensors["offset"].zero_()
    expected, actual = (case.run(f, tensors) for f in (deform_conv2d, modulated_deform_conv2d))
    assert_close(actual, expected)
    names = [name for name in tensors if padding == 0 or name != "offset"]
    inputs = [tensors[name] for name in names]
    assert_close(gradients(actual, inputs), gradients(expected, inputs), factor=2)


def test_without_offsets_it_is_a_convolution() -> None:
    case = PlainConvolution(groups=2, stride=(2, 1), dilation=(1, 2), padding=(2, 1), mask=False)
    tensors = case.tensors()
    with torch.no_grad():
        tensors["offset"].zero_()
    expected = torch.nn.functional.conv2d(
        tensors["input"], tensors["weight"], tensors["bias"], (2, 1), (2, 1), (1, 2), groups=2
    )
    assert_close(case.run(modulated_deform_conv2d, tensors), expected)


def test_dy_comes_before_dx_and_taps_are_row_major() -> None:
    image = torch.randn(1, 1, 6, 7, dtype=torch.float64)
    weight = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    weight[0, 0, 1, 0] = 1  # tap 3
    offset = 0.3 * torch.ones(1, 12, 5, 5, dtype=torch.float64)
    offset[:, 6], offset[:, 7] = -1, 2
    out = modulated_deform_conv2d(image, offset, weight)
    assert torch.equal(out[0, 0, 1:, :3], image[0, 0, 1:5, 2:5])


@pytest.mark.parametrize("value", FAR)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_far_offsets_sample_zero(value: float, dtype: torch.dtype) -> None:
    case = PlainConvolution(deform_groups=2, in_multiple=1, mask=True)
    tensors = case.tensors(dtype)
    offset = tensors["offset"]
    bad = torch.rand(offset.shape) < 0.2
    with torch.no_grad():
        offset[bad] = far(value, dtype)
    # A tap is lost where either of its coordinates is.
    lost = bad.unflatten(1, (-1, 2)).any(2)
    masked = tensors | {
        "offset": leaf(torch.where(bad, 0.5, offset)),
        "mask": leaf(torch.where(lost, 0, tensors["mask"])),
    }
    actual = case.run(modulated_deform_conv2d, tensors)
    expected = case.run(modulated_deform_conv2d, masked)
    assert 0 < lost.sum() < lost.numel()
    assert torch.equal(actual, expected)
    grads = dict(zip(tensors, gradients(actual, list(tensors.values())), strict=True))
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
    both = lost.repeat_interleave(2, dim=1)
    assert (grads["offset"][both] == 0).all()
    assert (grads["mask"][lost] == 0).all()
    expected_grads = dict(zip(masked, gradients(expected, list(masked.values())), strict=True))
    for name in ("input", "weight", "bias"):
        assert torch.equal(grads[name], expected_grads[name]), name
    assert torch.equal(grads["offset"][~both], expected_grads["offset"][~both])


@pytest.mark.parametrize("value", FAR)
def test_far_offsets_have_a_finite_second_derivative(value: float) -> None:
    case = PlainConvolution(batch=1, kernel=(2, 2), padding=(0, 0), margin=(1, 1))
    tensors = case.tensors()
    with torch.no_grad():
        tensors["offset"][:, 0] = value
    inputs = list(tensors.values())
    out = case.run(modulated_deform_conv2d, tensors)
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(torch.cat([g.flatten() for g in first]).square().sum(), inputs)
    assert all(g.isfinite().all() for g in (*first, *second))
    assert second[0].abs().sum() > 0


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_sample_at_no_place_is_nan(axis: int, value: float) -> None:
    image = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    offset = torch.full((1, 2, 4, 4), 0.25, dtype=torch.float64)
    offset[0, axis, 2, 2] = value
    offset.requires_grad_()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(2, 3, 1, 1, dtype=torch.float64)
    out = modulated_deform_conv2d(image, offset, weight, mask=mask)
    lost = torch.zeros(4, 4, dtype=torch.bool)
    lost[2, 2] = True
    assert torch.equal(out.isnan(), lost.expand_as(out))
    grads = torch.autograd.grad(out.sum(), [image, offset, mask])
    assert grads[0].isfinite().all()
    for grad in grads[1:]:
        assert torch.equal(grad.isnan(), lost.expand_as(grad))


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("argument", ["input", "mask", "weight"])
def test_what_is_not_finite_shows_where_torchvision_shows_it(argument: str, value: float) -> None:
    case = PlainConvolution(batch=1, margin=(4, 4))
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    tensors["offset"][:, ::4] += 100  # samples outside, too
    tensors[argument][tuple(size // 2 for size in tensors[argument].shape)] = value
    tensors["mask"][:, 2] = value if argument == "mask" else 1
    expected, actual = (case.run(f, tensors) for f in (deform_conv2d, modulated_deform_conv2d))
    assert not expected.isfinite().all()
    assert_same_finite(actual, expected, torch.float64)


@pytest.mark.parametrize("axis", [0, 1])
def test_exactly_minus_one_is_outside_without_gradient(axis: int) -> None:
    image = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def sample(coordinate: float) -> tuple[Tensor, Tensor]:
        offset = torch.full((1, 2, 4, 4), 0.25, dtype=torch.float64)
        offset[0, axis, 0, 0] = coordinate
        offset.requires_grad_()
        out = modulated_deform_conv2d(image, offset, weight)[0, 0, 0, 0]
        return out, torch.autograd.grad(out, offset)[0][0, :, 0, 0]

    value, gradient = sample(-1.0)
    assert value == 0
    assert (gradient == 0).all()
    value, gradient = sample(-1 + 1e-9)
    assert 0 < abs(value) < 1e-7
    assert abs(gradient[axis]) > 1e-3
    # The far border is outside from H (or W) on.
    assert sample(4.0)[0] == 0
    assert (sample(4.0)[1] == 0).all()
    assert abs(sample(4.0 - 1e-9)[1][axis]) > 1e-3
    assert abs(sample(3.5)[0]) > 1e-3


def test_large_negative_fractions_use_a_true_floor() -> None:
    # mmcv takes floorf even of doubles, which moves -1e-9 to cell 0 instead of cell -1.
    image = torch.tensor([[[[2.0, 3.0]]]], dtype=torch.float64)
    offset = torch.tensor([0.0, -1e-9], dtype=torch.float64).view(1, 2, 1, 1).repeat(1, 1, 1, 2)
    offset.requires_grad_()
    out = modulated_deform_conv2d(image, offset, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out[..., 0].sum(), offset)
    assert out[0, 0, 0, 0].item() == pytest.approx(2 * (1 - 1e-9), abs=1e-15)
    assert float(grad[0, 1, 0, 0]) == 2  # cell -1 .. 0; cell 0 .. 1 would give 1


def test_values_that_are_not_sampled_do_not_matter() -> None:
    case = PlainConvolution(batch=1, padding=(1, 1), margin=(4, 4))
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    tensors["input"][0, :, 0, 0], tensors["input"][0, :, -1, -1] = math.inf, math.nan
    for shift in (100.0, -100.0):
        offset = torch.full_like(tensors["offset"], shift)
        out = case.run(modulated_deform_conv2d, tensors | {"offset": offset})
        assert torch.equal(out, tensors["bias"].view(1, -1, 1, 1).expand_as(out))
    expected = case.run(deform_conv2d, tensors)
    actual = case.run(modulated_deform_conv2d, tensors)
    finite = expected.isfinite()
    assert 0 < finite.sum() < finite.numel()
    assert torch.equal(actual.isfinite(), finite)
    assert relative_l2(actual[finite], expected[finite]) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: str) -> None:
    case = PlainConvolution(deform_groups=2)
    tensors = case.tensors()
    strange = {
        name: leaf(t) if t.dim() == 1 else LAYOUTS[layout](t.detach()).requires_grad_()
        for name, t in tensors.items()
    }
    assert not strange["offset"].is_contiguous()
    expected = case.run(modulated_deform_conv2d, tensors)
    actual = case.run(modulated_deform_conv2d, strange)
    assert_close(actual, expected)
    assert_close(
        gradients(actual, list(strange.values())), gradients(expected, list(tensors.values()))
    )


def test_expanded_arguments() -> None:
    case = PlainConvolution()
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    shared = {
        name: t[:1].expand(2, *t.shape[1:]) if name in ("input", "offset", "mask") else t
        for name, t in tensors.items()
    }
    one = case.run(
        modulated_deform_conv2d,
        {k: t[:1] if k in ("input", "offset", "mask") else t for k, t in tensors.items()},
    )
    assert_close(case.run(modulated_deform_conv2d, shared), one.expand(2, *one.shape[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_and_dtype(dtype: torch.dtype) -> None:
    case = PlainConvolution(groups=2, deform_groups=2, in_multiple=8, out_multiple=8, margin=(6, 7))
    tensors = case.tensors(dtype)
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    actual = case.run(modulated_deform_conv2d, tensors)
    expected = case.run(modulated_deform_conv2d, exact)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    actual_grads = gradients(actual, list(tensors.values()), dtype)
    expected_grads = gradients(expected, list(exact.values()), dtype)
    assert [g.dtype for g in actual_grads] == [dtype] * len(tensors)
    assert_close(actual_grads, expected_grads, dtype, factor=2)


def test_the_result_is_channels_last() -> None:
    out = PlainConvolution().run(modulated_deform_conv2d, PlainConvolution().tensors())
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_parameters_of_another_type_than_the_input() -> None:
    case = PlainConvolution()
    tensors = case.tensors(torch.float32)
    weight = leaf(tensors["weight"], torch.float64)
    out = case.run(modulated_deform_conv2d, tensors | {"weight": weight})
    assert out.dtype == torch.float32
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float64


@pytest.mark.parametrize("mask", [True, False])
def test_empty_batch(mask: bool) -> None:
    case = PlainConvolution(batch=0, groups=2, deform_groups=2, mask=mask)
    tensors = case.tensors()
    out = case.run(modulated_deform_conv2d, tensors)
    one = PlainConvolution(batch=1, groups=2, deform_groups=2, mask=mask)
    assert out.shape == (0, *one.run(modulated_deform_conv2d, one.tensors()).shape[1:])
    out.sum().backward()
    grad = tensors["bias"].grad
    assert grad is not None
    assert (grad == 0).all()


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("padding", [1, 2])
def test_images_without_pixels(size: tuple[int, int], padding: int) -> None:
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    out_size = [s + 2 * padding - 2 for s in size]
    offset = torch.randn(2, 18, *out_size, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    out = modulated_deform_conv2d(image, offset, weight, bias, padding=padding)
    assert out.shape == (2, 4, *out_size)
    assert torch.equal(out, bias.view(1, 4, 1, 1).expand_as(out))


@pytest.mark.parametrize("mask", [True, False])
def test_gradcheck_and_gradgradcheck(mask: bool) -> None:
    case = PlainConvolution(
        batch=1, groups=2, deform_groups=2, in_multiple=1, out_multiple=1, kernel=(1, 2),
        stride=(1, 2), padding=(1, 0), margin=(1, 2), mask=mask,
    )  # fmt: skip
    tensors = case.tensors()
    names = list(tensors)

    def run(*values: Tensor) -> Tensor:
        return case.run(modulated_deform_conv2d, dict(zip(names, values, strict=True)))

    values = tuple(tensors.values())
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


def test_autocast_does_not_change_it() -> None:
    case = PlainConvolution(in_multiple=8)
    tensors = case.tensors(torch.float32)
    expected = case.run(modulated_deform_conv2d, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        actual = case.run(modulated_deform_conv2d, tensors)
    assert torch.equal(actual, expected)


def test_compiles_in_one_graph() -> None:
    case = PlainConvolution(kernel=(1, 2), padding=(0, 0), margin=(1, 1), deform_groups=2)
    tensors = case.tensors()
    torch._dynamo.reset()
    compiled = torch.compile(modulated_deform_conv2d, fullgraph=True, backend="aot_eager")
    actual, expected = (case.run(f, tensors) for f in (compiled, modulated_deform_conv2d))
    assert_close(actual, expected)
    inputs = list(tensors.values())
    assert_close(gradients(actual, inputs), gradients(expected, inputs), factor=2)

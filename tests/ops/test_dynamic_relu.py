"""The compiled dynamic ReLU, against the reference and against itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyhead_cuda import DynamicReLU, backend, functional, reference
from dyhead_cuda.reference import Activation
from tests.helpers.compare import TOLERANCE, assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.devices import Device, each_device, needs_cpu_library
from tests.helpers.inputs import random_relu_inputs

pytestmark = needs_cpu_library

activations = pytest.mark.parametrize("activation", ["hsigmoid", "sigmoid"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def run(inputs: Sequence[Tensor], activation: str = "hsigmoid", device: Device = "cpu") -> Tensor:
    with backend(device):
        return functional.dynamic_relu(*inputs, activation=activation)  # type: ignore[arg-type]


def exact(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [leaf(t, torch.float64) for t in inputs]


def check(inputs: Sequence[Tensor], activation: str) -> None:
    """Result and all gradients against the reference in float64, within the tolerance of x."""
    dtype = inputs[0].dtype
    precise = exact(inputs)
    expected = reference.dynamic_relu(*precise, activation=activation)  # type: ignore[arg-type]
    actual = run(inputs, activation)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    grads = gradients(actual, inputs, dtype)
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    # Sums over pixels of both signs: a single one of them may cancel to nearly nothing.
    assert_gradients_close(grads, gradients(expected, precise, dtype), dtype, floor=0.1)


# --- against the reference ------------------------------------------------------------------------


@dtypes
@activations
@pytest.mark.parametrize("channels", [1, 3, 37, 64, 260])
def test_channels(channels: int, activation: str, dtype: torch.dtype) -> None:
    check(random_relu_inputs((2, channels, 5, 7), dtype), activation)


@dtypes
@activations
@pytest.mark.parametrize("pixels", [1, 2, 255, 256, 257, 511, 512, 513, 2000])
def test_pixels(pixels: int, activation: str, dtype: torch.dtype) -> None:
    # 256 rows are one task, so that is where sums are split.
    check(random_relu_inputs((2, 5, pixels), dtype, seed=pixels), activation)


@settings(max_examples=100)
@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 70),
    pixels=st.integers(1, 600),
    hidden=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCE)),
    activation=st.sampled_from(["hsigmoid", "sigmoid"]),
    seed=st.integers(0, 10**6),
)
@example(1, 16, 1, 16, torch.float32, "hsigmoid", 1)
@example(1, 17, 1, 33, torch.bfloat16, "sigmoid", 2)
def test_random_sizes(
    batch: int,
    channels: int,
    pixels: int,
    hidden: int,
    dtype: torch.dtype,
    activation: str,
    seed: int,
) -> None:
    inputs = random_relu_inputs((batch, channels, pixels), dtype, hidden=hidden, seed=seed)
    check(inputs, activation)


@pytest.mark.parametrize("trailing", [(), (6,), (3, 4), (2, 3, 4)])
@activations
def test_any_number_of_dimensions(trailing: tuple[int, ...], activation: str) -> None:
    check(random_relu_inputs((3, 8, *trailing)), activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mean_far_from_zero_is_summed_precisely(dtype: torch.dtype) -> None:
    inputs = random_relu_inputs((2, 8, 5000), dtype)
    with torch.no_grad():
        inputs[0] += 30
        inputs[1] /= 30
    check(inputs, "hsigmoid")


@pytest.mark.parametrize("parameter_dtype", TOLERANCE)
@dtypes
def test_parameters_of_another_type(dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    inputs = random_relu_inputs((2, 12, 9), dtype, parameter_dtype=parameter_dtype)
    out = run(inputs)
    grads = gradients(out, inputs, dtype)
    assert out.dtype == grads[0].dtype == dtype
    assert [g.dtype for g in grads[1:]] == [parameter_dtype] * 4
    precise = exact(inputs)
    expected = reference.dynamic_relu(*precise)
    coarser = max((dtype, parameter_dtype), key=lambda kind: TOLERANCE[kind])
    assert_close(out, expected, dtype)
    assert_close(grads, gradients(expected, precise, dtype), coarser, factor=2)


def identity_arguments(values: Tensor) -> list[Tensor]:
    """Images of one channel and pixel, and parameters with which max(x, x) = x is the result."""
    one = torch.zeros(1, 1)
    bias = torch.tensor([0.0, 0.0, 9.0, 0.0])  # a1 = 1, a2 = hsigmoid(9) * 2 - 1 = 1
    return [values.view(-1, 1, 1), one, torch.zeros(1), torch.zeros(4, 1), bias]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_survives(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    assert values.numel() > 60000
    out = run(identity_arguments(values)).flatten()
    # 0 is the only value with two encodings: -0 + 0 is +0.
    assert torch.equal(out, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    arguments = identity_arguments(values)
    bias = torch.tensor([1.0, -1.5, 0.0, -2.0])
    out = run([*arguments[:4], bias]).flatten()
    coefficients = 2 * ((bias + 3) / 6) - 1
    wide = values.float()
    first = wide * (coefficients[0] + 1) + coefficients[1] / 2
    expected = torch.maximum(first, wide * coefficients[2] + coefficients[3] / 2).to(dtype)
    assert torch.equal(out, expected)


# --- empty, layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (0, 8), (2, 8, 0, 4), (2, 8, 3, 0), (0, 8, 0)])
@pytest.mark.parametrize("name", ["cpu", "reference", "auto"])
def test_empty_inputs(shape: tuple[int, ...], name: str) -> None:
    inputs = random_relu_inputs(shape)
    with backend(name):  # type: ignore[arg-type]
        out = functional.dynamic_relu(*inputs)
    assert out.shape == shape
    out.sum().backward()
    assert inputs[0].grad is not None
    for t in inputs[1:]:
        if 0 in shape[2:]:  # without a pixel there is no mean, so nothing depends on the layers
            assert t.grad is None or (t.grad == 0).all()
        else:
            assert t.grad is not None
            assert t.grad.shape == t.shape
            assert (t.grad == 0).all()


def sliced(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), 1e9, dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": sliced,
    "channel slice": lambda t: torch.cat([t + 1e6, t, t + 1e6], 1)[:, t.shape[1] : -t.shape[1]],
    "channels_last slice": lambda t: torch.cat([t, t + 1e6], 1).contiguous(
        memory_format=torch.channels_last
    )[:, : t.shape[1]],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layout_does_not_matter(layout: str, dtype: torch.dtype) -> None:
    inputs = random_relu_inputs((3, 6, 4, 5), dtype)
    strange = LAYOUTS[layout](inputs[0].detach()).requires_grad_()
    assert not strange.is_contiguous()
    assert torch.equal(strange, inputs[0])
    expected, actual = run(inputs), run([strange, *inputs[1:]])
    assert torch.equal(actual, expected)
    for a, e in zip(
        gradients(actual, [strange, *inputs[1:]]), gradients(expected, inputs), strict=True
    ):
        assert torch.equal(a, e)


def test_expanded_inputs_and_cotangents() -> None:
    inputs = random_relu_inputs((1, 6, 4, 5))
    wide = [inputs[0].expand(3, -1, -1, -1), *inputs[1:]]
    precise = exact(inputs)
    expected = reference.dynamic_relu(precise[0].expand(3, -1, -1, -1), *precise[1:])
    # The gradient of a sum is expanded from one number.
    got = torch.autograd.grad(run(wide).sum(), inputs)
    assert_close(got, torch.autograd.grad(expected.sum(), precise), factor=2)


def test_strange_parameters() -> None:
    inputs = random_relu_inputs((2, 6, 4))
    strange = [
        inputs[0],
        inputs[1].detach().t().contiguous().t().requires_grad_(),
        sliced(inputs[2].detach()).requires_grad_(),
        sliced(inputs[3].detach()).requires_grad_(),
        sliced(inputs[4].detach()).requires_grad_(),
    ]
    assert torch.equal(run(strange), run(inputs))
    for a, e in zip(gradients(run(strange), strange), gradients(run(inputs), inputs), strict=True):
        assert torch.equal(a, e)


class Recorder(TorchDispatchMode):
    """Remembers the arguments of the compiled forward."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.dyhead.dynamic_relu_fwd.default:
            self.rows.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "layout", "in_place"),
    [
        ((2, 6, 4, 5), torch.channels_last, True),
        ((2, 6, 2, 4, 5), torch.channels_last_3d, True),
        ((2, 6), torch.contiguous_format, True),
        ((2, 6, 4, 5), torch.contiguous_format, False),
    ],
)
def test_rows_are_read_in_place(
    shape: tuple[int, ...], layout: torch.memory_format, in_place: bool
) -> None:
    x, *parameters = (t.detach() for t in random_relu_inputs(shape))
    x = x.contiguous(memory_format=layout)
    with Recorder() as recorder:
        out = run([x, *parameters])
    (rows,) = recorder.rows
    assert (rows.data_ptr() == x.data_ptr()) == in_place
    assert out.is_contiguous(memory_format=layout)


# --- ties, saturation, NaN ------------------------------------------------------------------------


@activations
def test_ties_split_the_gradient_as_the_reference(activation: Activation) -> None:
    # Equal coefficients (a1 = a2 = 1 for every channel of saturated gates) tie at every value;
    # x = 0 with b1 = b2 ties whatever the slopes are.
    x, w1, b1, w2, b2 = random_relu_inputs((2, 4, 6), torch.float64)
    with torch.no_grad():
        x[..., ::2] = 0
        w2.zero_()
        b2[4:8] = b2[12:] = 0.7
        if activation == "hsigmoid":
            b2[:2], b2[8:10] = 0, 5
    check([x, w1, b1, w2, b2], activation)
    out = run([x, w1, b1, w2, b2], activation)
    again = reference.dynamic_relu(x, w1, b1, w2, b2, activation=activation)
    tied = (gradients(out, [x])[0] - gradients(again, [x])[0]).abs().max()
    assert tied < 1e-14


@pytest.mark.parametrize("logit", [-3.0, 3.0, -3.5, 3.5, -1e4, 1e4])
@activations
def test_saturated_gates(logit: float, activation: Activation) -> None:
    inputs = random_relu_inputs((2, 4, 6), torch.float64)
    with torch.no_grad():
        inputs[3][::3] = 0  # logits that are exactly their bias
        inputs[4][::3] = logit
    check(inputs, activation)
    if activation == "hsigmoid":
        (grad,) = torch.autograd.grad(run(inputs, activation).sum(), [inputs[4]])
        assert (grad[::3] == 0).all()
        assert (grad != 0).any()


def test_a_dead_hidden_layer() -> None:
    inputs = random_relu_inputs((2, 8, 6))
    with torch.no_grad():
        inputs[2].fill_(-100)
    check(inputs, "hsigmoid")
    with torch.no_grad():  # exactly zero before the ReLU: no gradient passes, as in torch
        inputs[1].zero_()
        inputs[2].zero_()
    check(inputs, "hsigmoid")


@dtypes
@activations
def test_nan_comes_through(activation: Activation, dtype: torch.dtype) -> None:
    inputs = random_relu_inputs((3, 8, 300), dtype)
    with torch.no_grad():
        inputs[0][1, 2, 270] = math.nan
    out = run(inputs, activation)
    # The mean of image 1 is NaN, and with it every coefficient; the others know nothing of it.
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()


@activations
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(5))
def test_non_finite_arguments_as_the_reference(
    place: int, value: float, activation: Activation
) -> None:
    inputs = random_relu_inputs((2, 4, 5), hidden=3)
    with torch.no_grad():
        inputs[place].view(-1)[1] = value
    out, expected = run(inputs, activation), reference.dynamic_relu(*inputs, activation=activation)
    assert torch.equal(out.isnan(), expected.isnan())
    same = ~expected.isnan()
    assert torch.equal(out[same].isinf(), expected[same].isinf())
    finite = expected.isfinite()
    assert_close(out[finite], expected[finite])


# --- autograd -------------------------------------------------------------------------------------


@each_device
@activations
@pytest.mark.parametrize(("shape", "hidden"), [((2, 4, 3, 2), 2), ((2, 3, 5), 8)])
def test_gradcheck(
    shape: tuple[int, ...], hidden: int, activation: Activation, device: Device
) -> None:
    inputs = [leaf(t.to(device)) for t in random_relu_inputs(shape, hidden=hidden)]
    assert torch.autograd.gradcheck(lambda *t: run(t, activation, device), inputs)


@pytest.mark.parametrize("wanted", range(5))
def test_any_subset_of_gradients(wanted: int) -> None:
    inputs = random_relu_inputs((2, 4, 5))
    expected = gradients(run(inputs), inputs)[wanted]
    alone = [t.detach() for t in inputs]
    alone[wanted].requires_grad_()
    assert torch.equal(gradients(run(alone), [alone[wanted]])[0], expected)


def test_second_derivatives_raise_and_name_the_reference() -> None:
    inputs = random_relu_inputs((2, 4, 5))
    (grad,) = torch.autograd.grad(run(inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"reference"):
        torch.autograd.grad(grad.square().sum(), inputs[0])


def test_the_reference_backend_has_second_derivatives() -> None:
    inputs = random_relu_inputs((2, 4, 5))
    with backend("reference"):
        assert torch.autograd.gradgradcheck(functional.dynamic_relu, inputs)


# --- in the module, in a graph, in a region -------------------------------------------------------


@activations
def test_module_equals_the_reference(activation: Activation) -> None:
    module = DynamicReLU(12, reduction=3, activation=activation).double()
    x = leaf(torch.randn(2, 12, 5, 6, dtype=torch.float64))
    inputs = [x, *module.parameters()]
    actual = module(x)
    with backend("reference"):
        expected = module(x)
    assert_close(actual, expected)
    assert_close(gradients(actual, inputs), gradients(expected, inputs), factor=2)


def test_compiles_in_one_graph_with_gradients() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(functional.dynamic_relu, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = random_relu_inputs((2, 8, 5, 6), dtype, parameter_dtype=torch.float32)
        actual, expected = compiled(*inputs), functional.dynamic_relu(*inputs)
        assert torch.equal(actual, expected)
        assert_close(gradients(actual, inputs), gradients(expected, inputs), dtype)


def test_compiles_for_sizes_that_change() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        functional.dynamic_relu, fullgraph=True, backend="aot_eager", dynamic=True
    )
    parameters = random_relu_inputs((2, 8, 5), torch.float64)[1:]
    for shape in [(2, 8, 5, 6), (3, 8, 9, 4), (5, 8, 2, 2)]:
        x = leaf(torch.randn(shape, dtype=torch.float64))
        assert torch.equal(compiled(x, *parameters), functional.dynamic_relu(x, *parameters))


def test_autocast_does_not_change_it() -> None:
    inputs = random_relu_inputs((2, 8, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(inputs)
    assert out.dtype == torch.float32
    assert torch.equal(out, run(inputs))
    for a, b in zip(gradients(out, inputs), gradients(run(inputs), inputs), strict=True):
        assert torch.equal(a, b)


def test_inference_mode() -> None:
    inputs = [t.detach() for t in random_relu_inputs((2, 8, 5))]
    with torch.inference_mode():
        assert torch.equal(run(inputs), run(inputs))

"""The CUDA dynamic ReLU on a GPU, against the reference in float64 on that GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from dyhead_cuda.reference import Activation
from tests.helpers import relu_checks
from tests.helpers.compare import (
    TOLERANCE,
    assert_close,
    gradients,
    leaf,
    relative_l2,
)
from tests.helpers.relu_checks import check, expected_of, run

from .device import captured, heavy, need_memory, need_two_devices, on_a_busy_stream

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
activations = pytest.mark.parametrize("activation", ["hsigmoid", "sigmoid"])


random_inputs = partial(relu_checks.random_inputs, device=DEVICE)


# --- against the reference ----------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 64, 20, 30), (3, 37, 130)])
def test_small(shape: Sequence[int], dtype: torch.dtype) -> None:
    check(random_inputs(shape, dtype))


@dtypes
@activations
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),  # one pixel of one channel
        (5, 8),  # no pixels to average over
        (7, 100, 13, 11),
        (2, 264, 9, 9),
        (1, 1, 100_003),
        (2, 256, 100, 168),  # many blocks for each image
        (1000, 256, 7, 7),  # regions: a block each
        (40_000, 8, 1),  # more images than in flight
        (1, 1024, 9),
        (2, 640, 9),  # in half precision 48 KB of shared memory, static and dynamic, but not alone
    ],
    ids=str,
)
def test_sizes(shape: Sequence[int], activation: Activation, dtype: torch.dtype) -> None:
    check(random_inputs(shape, dtype), activation)


@dtypes
def test_unaligned_rows(dtype: torch.dtype) -> None:
    x, *parameters = random_inputs((2, 64, 70), dtype)
    memory = torch.empty(x.numel() + 1, dtype=dtype, device=x.device)
    rows = memory[1:].view(2, 70, 64)
    unaligned = rows.copy_(x.detach().transpose(1, 2)).transpose(1, 2).requires_grad_()
    check([unaligned, *parameters])


@dtypes
def test_layouts(dtype: torch.dtype) -> None:
    x, *parameters = random_inputs((2, 64, 9, 14), dtype)
    out = run([x, *parameters])
    assert out.is_contiguous()
    wide = torch.cat([x, x], 3)[:, :, :, :14]
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        wide,
    ):
        assert torch.equal(run([other, *parameters]), out)
    (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)  # an expanded gradient
    (dense,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad, dense)


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_come_through(value: float, dtype: torch.dtype) -> None:
    inputs = [t.detach() for t in random_inputs((3, 16, 70), dtype)]
    inputs[0][1, 5, 17] = value
    expected = expected_of([t.double() for t in inputs])
    out = run(inputs).double()
    assert not expected[1].isfinite().all()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf() * out.sign(), expected.isinf() * expected.sign())
    finite = expected.isfinite()
    assert relative_l2(out[finite], expected[finite]) <= TOLERANCE[dtype]


def test_no_images() -> None:
    rows = torch.empty(0, 5, 8, device=DEVICE)
    _, *parameters = random_inputs((1, 8, 5), torch.float32)
    arguments = [t.detach() for t in parameters]
    out, _, hidden, logits = torch.ops.dyhead.dynamic_relu_fwd(rows, *arguments, True)
    fc1_weight, _, fc2_weight, _ = arguments
    grad_rows, _, _ = torch.ops.dyhead.dynamic_relu_bwd(
        out, rows, hidden, logits, fc1_weight, fc2_weight, True, [1, 1, 1]
    )
    assert out.shape == grad_rows.shape == rows.shape


def test_more_channels_than_shared_memory_holds_raise() -> None:
    channels = 2**16
    shapes = [(1, channels, 3), (1, channels), (1,), (4 * channels, 1), (4 * channels,)]
    tensors = [torch.randn(shape, device=DEVICE) for shape in shapes]
    with pytest.raises(RuntimeError, match="shared memory of a block"):
        run(tensors)
    # No error stays behind for the next kernel of anyone to find.
    assert torch.ones(5, device=DEVICE).sum() == 5


@heavy
def test_more_than_2_to_the_31_elements() -> None:
    images, pixels, channels = 9, 1_000_000, 256
    assert images * pixels * channels > 2**31
    need_memory(60)
    source = torch.Generator(DEVICE).manual_seed(0)

    def normal() -> Tensor:
        rows = torch.empty(images, pixels, channels, dtype=torch.bfloat16, device=DEVICE)
        return rows.normal_(generator=source).transpose(1, 2)

    x, grad_out = normal().requires_grad_(), normal()
    _, *parameters = random_inputs((1, channels, 1), torch.bfloat16)
    out = run([x, *parameters])
    (grad,) = torch.autograd.grad(out, x, grad_out)
    last = leaf(x[-1:], torch.float64)
    expected = expected_of([last, *(p.detach().double() for p in parameters)])
    (wanted,) = torch.autograd.grad(expected, last, grad_out[-1:].double())
    end = (slice(None), slice(None), slice(-10_000, None))
    assert_close(out[-1:][end], expected[end], torch.bfloat16)
    assert_close(grad[-1:][end], wanted[end], torch.bfloat16, factor=2)


# --- gradients and contracts of the operator ----------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(2, 256, 50, 84), (3, 37, 1000)])
def test_runs_give_the_same_bits(shape: Sequence[int], dtype: torch.dtype) -> None:
    inputs = random_inputs(shape, dtype)

    def results() -> list[Tensor]:
        out = run(inputs)
        return [out.detach(), *gradients(out, inputs, dtype)]

    first = results()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(results(), first, strict=True))


# --- streams, graphs, devices -------------------------------------------------------------------


def test_runs_on_the_current_stream() -> None:
    inputs = [t.detach() for t in random_inputs((2, 64, 50, 50), torch.float32)]
    expected = run(inputs)
    late = torch.full_like(inputs[0], math.nan)
    (out,) = on_a_busy_stream(late, inputs[0], lambda: [run([late, *inputs[1:]])])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(2, 256, 50, 84), (100, 64, 7, 7)])
def test_graph_capture(shape: Sequence[int]) -> None:
    inputs = [t.detach() for t in random_inputs(shape, torch.bfloat16)]
    graph, (out,) = captured(lambda: [run(inputs)])
    for seed in range(1, 4):
        inputs[0].copy_(random_inputs(shape, torch.bfloat16, seed=seed)[0].detach())
        graph.replay()
        assert torch.equal(out, run(inputs))


def test_runs_on_the_device_of_its_tensors() -> None:
    need_two_devices()
    assert torch.cuda.current_device() == 0
    check(random_inputs((2, 64, 300), torch.float32, device="cuda:1"))
    assert torch.cuda.current_device() == 0

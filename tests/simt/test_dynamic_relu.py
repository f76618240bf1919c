"""The CUDA dynamic ReLU, compiled for the host, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dyhead_cuda import reference
from dyhead_cuda.reference import Activation
from tests.helpers.compare import TOLERANCE, assert_close, assert_gradients_close, leaf, relative_l2
from tests.helpers.inputs import random_relu_inputs

from .arithmetic import dtypes
from .arrays import flat_array, name_of, to_array, to_tensor
from .wanted import assert_only_wanted

activations = pytest.mark.parametrize("activation", ["hsigmoid", "sigmoid"])


def random_inputs(
    images: int,
    pixels: int,
    channels: int,
    dtype: torch.dtype = torch.float64,
    *,
    hidden: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """rows [N, P, C] and the four parameters in the accumulation type."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x, *parameters = random_relu_inputs(
        (images, channels, pixels), dtype, hidden=hidden, parameter_dtype=compute, seed=seed
    )
    return [t.detach() for t in (x.transpose(1, 2).contiguous(), *parameters)]


@dataclass(frozen=True)
class Operator:
    """The emulated operator. Rows, gradients and results start `skew` elements off alignment."""

    simt: Any
    activation: Activation = "hsigmoid"
    skew: int = 0
    grid: Any = None  # in place of the grid that dynamic_relu_grid chooses

    def forward(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        rows = inputs[0]
        results = self.simt.dynamic_relu.forward(
            name_of(rows.dtype),
            *rows.shape[:2],
            *self._arrays(inputs),
            hard_sigmoid=self.activation == "hsigmoid",
            skew=self.skew,
            grid=self.grid,
        )
        return self._tensors(results, "out", rows)

    def backward(
        self,
        inputs: Sequence[Tensor],
        kept: dict[str, Tensor],
        grad_out: Tensor,
        wanted: Sequence[int] = (1, 1, 1),
    ) -> dict[str, Any]:
        """None for what is not wanted."""
        rows, fc1_weight, _, fc2_weight, _ = inputs
        arguments = (grad_out, rows, kept["hidden"], kept["logits"], fc1_weight, fc2_weight)
        results = self.simt.dynamic_relu.backward(
            name_of(rows.dtype),
            *rows.shape[:2],
            *self._arrays(arguments),
            hard_sigmoid=self.activation == "hsigmoid",
            skew=self.skew,
            grid=self.grid,
            wanted=list(wanted),
        )
        return self._tensors(results, "grad_rows", rows)

    def gradients(
        self, inputs: Sequence[Tensor], kept: dict[str, Tensor], grad_out: Tensor
    ) -> list[Tensor]:
        """Of rows and the four parameters, as the autograd function composes them."""
        g = self.backward(inputs, kept, grad_out)
        return [
            g["grad_rows"],
            g["grad_hidden"].t() @ kept["mean"],
            g["grad_hidden"].sum(0),
            g["grad_logits"].t() @ kept["hidden"],
            g["grad_logits"].sum(0),
        ]

    def _arrays(self, tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
        return [flat_array(t, self.skew) if t.dim() == 3 else to_array(t) for t in tensors]

    def _tensors(
        self, results: dict[str, NDArray[Any] | None], flat: str, rows: Tensor
    ) -> dict[str, Any]:
        tensors = {
            name: None if array is None else to_tensor(array, rows.dtype)
            for name, array in results.items()
        }
        if (whole := tensors[flat]) is not None:
            assert whole[: self.skew].isnan().all(), "written before the first row"
            tensors[flat] = whole[self.skew :].view(rows.shape)
        return tensors


def expected_forward(inputs: Sequence[Tensor], activation: Activation) -> Tensor:
    """The reference's result in the layout and with the gradients of rows [N, P, C]."""
    rows, *parameters = inputs
    out = reference.dynamic_relu(rows.transpose(1, 2), *parameters, activation=activation)
    return out.transpose(1, 2)


def check_forward(operator: Operator, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    expected = expected_forward([t.double() for t in inputs], operator.activation)
    results = operator.forward(inputs)
    assert_close(results["out"], expected, inputs[0].dtype)
    return results


def check(operator: Operator, inputs: Sequence[Tensor]) -> None:
    """Result and all gradients against the reference in float64."""
    dtype = inputs[0].dtype
    results = check_forward(operator, inputs)
    source = torch.Generator().manual_seed(99)
    grad_out = torch.randn(inputs[0].shape, generator=source, dtype=torch.float64).to(dtype)
    precise = [leaf(t, torch.float64) for t in inputs]
    expected = expected_forward(precise, operator.activation)
    wanted = torch.autograd.grad(expected, precise, grad_out.double())
    actual = operator.gradients(inputs, results, grad_out)
    assert [g.dtype for g in actual] == [t.dtype for t in inputs]
    assert_gradients_close(actual, wanted, dtype)


@pytest.fixture
def resident(simt: Any) -> Iterator[Callable[[int], None]]:
    """Sets how many blocks the device holds; the number of before comes back."""
    yield simt.set_resident_blocks
    simt.set_resident_blocks(4)


# --- the grid -----------------------------------------------------------------------------------


def chosen_grid(simt: Any, images: int, pixels: int, resident_blocks: int) -> tuple[int, int, bool]:
    grid = simt.dynamic_relu.grid(images, pixels, resident_blocks)
    return grid.blocks_per_image, grid.images_in_flight, grid.cooperative


def test_grid_of_the_documented_examples(simt: Any) -> None:
    assert chosen_grid(simt, 2, 100 * 168, 1056) == (256, 2, True)
    assert chosen_grid(simt, 1000, 7 * 7, 1056) == (1, 1000, False)


@given(
    images=st.integers(1, 10**6),
    pixels=st.integers(1, 10**8),
    resident_blocks=st.integers(0, 3000),
)
def test_grid_fits_the_device(simt: Any, images: int, pixels: int, resident_blocks: int) -> None:
    blocks, in_flight, cooperative = chosen_grid(simt, images, pixels, resident_blocks)
    assert 1 <= blocks <= 256
    assert blocks == 1 or 64 * (blocks - 1) < pixels
    assert 1 <= in_flight <= min(images, 32768)
    assert cooperative == (blocks > 1)
    assert not cooperative or blocks * in_flight <= resident_blocks


# --- against the reference ----------------------------------------------------------------------


@dtypes
@activations
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("channels", "pixels"),
    # one pixel or channel; several passes of a block over a row (37, 100 and 264 channels are no
    # power of two of vectors); hidden layers from 1 to 66 wide
    [(1, 1), (1, 700), (3, 65), (37, 130), (64, 300), (100, 64), (264, 1), (264, 70)],
)
def test_sizes(
    simt: Any, channels: int, pixels: int, activation: Activation, dtype: torch.dtype
) -> None:
    check(Operator(simt, activation), random_inputs(1, pixels, channels, dtype, seed=pixels))


@dtypes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(("resident_blocks", "blocks"), [(2, 1), (7, 2), (12, 3)])
@pytest.mark.parametrize("channels", [3, 64])
def test_images_share_the_device(
    simt: Any,
    resident: Callable[[int], None],
    channels: int,
    resident_blocks: int,
    blocks: int,
    dtype: torch.dtype,
) -> None:
    resident(resident_blocks)
    assert chosen_grid(simt, 3, 130, resident_blocks) == (blocks, 3, blocks > 1)
    check(Operator(simt), random_inputs(3, 130, channels, dtype, seed=1))


@dtypes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_more_images_than_in_flight(
    simt: Any, blocks: int, in_flight: int, dtype: torch.dtype
) -> None:
    grid = simt.dynamic_relu.Grid(blocks, in_flight, blocks > 1)
    check(Operator(simt, grid=grid), random_inputs(7, 9, 40, dtype))


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("pixels", [1, 2, 3, 5, 9])
def test_more_blocks_than_a_division_fills(simt: Any, pixels: int) -> None:
    # 5 pixels over 4 blocks are stretches of 2, 2, 1 and none.
    grid = simt.dynamic_relu.Grid(4, 1, True)
    check(Operator(simt, grid=grid), random_inputs(1, pixels, 6))


@dtypes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("skew", [1, 3])
def test_unaligned_arrays(simt: Any, skew: int, dtype: torch.dtype) -> None:
    check(Operator(simt, skew=skew), random_inputs(1, 70, 64, dtype))


def test_no_images(simt: Any) -> None:
    operator = Operator(simt, grid=simt.dynamic_relu.Grid(1, 1, False))
    inputs = random_inputs(0, 5, 8)
    results = operator.forward(inputs)
    grads = operator.backward(inputs, results, inputs[0])
    assert results["out"].shape == grads["grad_rows"].shape == (0, 5, 8)


@settings(max_examples=15)
@given(
    images=st.integers(1, 4),
    pixels=st.integers(1, 300),
    channels=st.integers(1, 80),
    hidden=st.integers(8, 70),
    dtype=st.sampled_from(list(TOLERANCE)),
    activation=st.sampled_from(["hsigmoid", "sigmoid"]),
    skew=st.integers(0, 1),
    seed=st.integers(0, 10**6),
)
def test_random_sizes(
    simt: Any,
    images: int,
    pixels: int,
    channels: int,
    hidden: int,
    dtype: torch.dtype,
    activation: Activation,
    skew: int,
    seed: int,
) -> None:
    simt.set_seed(seed)
    inputs = random_inputs(images, pixels, channels, dtype, hidden=hidden, seed=seed)
    check(Operator(simt, activation, skew), inputs)


# --- special values -----------------------------------------------------------------------------


@dtypes
def test_ties_share_the_gradient(simt: Any, dtype: torch.dtype) -> None:
    channels = 16
    rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias = random_inputs(2, 40, channels, dtype)
    rows[:, ::3] = 0
    a1, b1, a2, b2 = torch.arange(4 * channels).chunk(4)
    fc2_weight[b2], fc2_bias[b2] = fc2_weight[b1], fc2_bias[b1]  # so both branches agree at x = 0
    inputs = [rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias]
    check(Operator(simt), inputs)
    # hsigmoid(-4) = 0 and hsigmoid(0) = 1/2 make a1 = a2 = 0: both branches agree everywhere.
    fc2_weight[a1], fc2_bias[a1] = 0, -4
    fc2_weight[a2], fc2_bias[a2] = 0, 0
    check(Operator(simt), inputs)


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_come_through(simt: Any, value: float, dtype: torch.dtype) -> None:
    inputs = random_inputs(3, 70, 16, dtype)
    inputs[0][1, 17, 5] = value
    expected = expected_forward([t.double() for t in inputs], "hsigmoid")
    out = Operator(simt).forward(inputs)["out"].double()
    assert not expected[1].isfinite().all()
    assert expected[[0, 2]].isfinite().all()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf() * out.sign(), expected.isinf() * expected.sign())
    finite = expected.isfinite()
    assert relative_l2(out[finite], expected[finite]) <= TOLERANCE[dtype]


# --- gradients of the emulated forward itself -----------------------------------------------------


@activations
@pytest.mark.parametrize("blocks", [1, 2])
def test_gradcheck(simt: Any, blocks: int, activation: Activation) -> None:
    grid = simt.dynamic_relu.Grid(blocks, 1, blocks > 1)
    operator = Operator(simt, activation, grid=grid)
    inputs = random_inputs(1, 3, 3, hidden=2)
    grad_out = random_inputs(1, 3, 3, seed=1)[0]
    actual = operator.gradients(inputs, operator.forward(inputs), grad_out)
    step = 1e-6
    for t, gradient in zip(inputs, actual, strict=True):
        flat = t.view(-1)
        for i in range(t.numel()):
            values = []
            for signed_step in (step, -step):
                before = float(flat[i])
                flat[i] += signed_step
                values.append((operator.forward(inputs)["out"] * grad_out).sum())
                flat[i] = before
            numeric = float(values[0] - values[1]) / (2 * step)
            assert float(gradient.view(-1)[i]) == pytest.approx(numeric, rel=1e-6, abs=1e-8)


# --- what is not wanted --------------------------------------------------------------------------


@dtypes
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(("images", "pixels"), [(1, 300), (3, 130), (2, 9)])
def test_only_what_is_wanted(simt: Any, images: int, pixels: int, dtype: torch.dtype) -> None:
    operator = Operator(simt)
    inputs = random_inputs(images, pixels, 16, dtype)
    kept = operator.forward(inputs)
    assert_only_wanted(
        lambda wanted: list(operator.backward(inputs, kept, inputs[0], wanted).values()), 3
    )


# --- determinism --------------------------------------------------------------------------------


@dtypes
def test_every_order_gives_the_same_bits(simt: Any, dtype: torch.dtype) -> None:
    inputs = random_inputs(2, 200, 40, dtype)
    grad_out = random_inputs(2, 200, 40, dtype, seed=1)[0]
    operator = Operator(simt)

    def run(seed: int) -> list[Tensor]:
        simt.set_seed(seed)
        results = operator.forward(inputs)
        grads = operator.backward(inputs, results, grad_out)
        return [*results.values(), *grads.values()]

    first = run(0)
    for seed in range(1, 6):
        for a, b in zip(run(seed), first, strict=True):
            assert torch.equal(a, b)

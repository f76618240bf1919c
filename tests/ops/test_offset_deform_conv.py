"""``dyhead::offset_deform_conv``: against the reference, and against two calls of deform_conv."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dyhead_cuda import library
from dyhead_cuda.ops.common import compute_dtype
from tests.helpers.compare import TOLERANCE, assert_close, gradients, leaf
from tests.helpers.deform_checks import (
    assert_same_bits,
    assert_second_derivative_raises,
    assert_threads_give_the_same_bits,
    check,
)
from tests.helpers.deform_work import PLAIN
from tests.helpers.devices import each_device
from tests.helpers.offset_work import CONVOLUTIONS, GRADIENTS, WORKS, OffsetCall, OffsetWork

library.require("cpu")

FORWARD = torch.ops.dyhead.offset_deform_conv_fwd
BACKWARD = torch.ops.dyhead.offset_deform_conv_bwd
HALVES = (torch.bfloat16, torch.float16)


@each_device
@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_reference_with_all_gradients(
    name: str, dtype: torch.dtype, device: str
) -> None:
    check(WORKS[name], dtype, WORKS[name].tensors(dtype, device))


def both_ways(
    work: OffsetCall, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[list[list[Tensor]], list[dict[str, Tensor]]]:
    """Results and gradients as one operator, and as two calls."""
    outs = [work.run(tensors), work.separately(tensors)]
    grads = [gradients(out, list(tensors.values()), dtype) for out in outs]
    return outs, [dict(zip(tensors, of_one, strict=True)) for of_one in grads]


def assert_sums_close(found: Tensor, separate: Tensor) -> None:
    """The same sums in another order; 16 bits leave one rounding."""
    roundings = 1 if found.dtype in HALVES else 8
    largest = separate.abs().max().double() if separate.numel() else 0
    allowed = roundings * torch.finfo(found.dtype).eps * largest
    assert ((found.double() - separate.double()).abs() <= allowed).all()


@pytest.mark.parametrize("name", [*WORKS, *CONVOLUTIONS])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_two_calls(name: str, dtype: torch.dtype) -> None:
    """In all bits, but for the features' gradient: it is one sum, which is rounded once."""
    work = (WORKS | CONVOLUTIONS)[name]
    tensors = work.tensors(dtype)
    (together, apart), (grads, expected) = both_ways(work, tensors, dtype)
    assert_same_bits(together, apart)
    assert_sums_close(grads.pop("source"), expected.pop("source"))
    assert_same_bits(list(grads.values()), list(expected.values()))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_gradient_of_the_features_is_rounded_once(dtype: torch.dtype) -> None:
    """It is what the same values give in float32, rounded; that of two calls is not everywhere.

    Operands that bfloat16 holds, so that its products are exact. The order of sums is left.
    """
    torch.manual_seed(0)
    work = WORKS["several chunks"]
    tensors = work.tensors(dtype)
    for name in ("offset_weight", "weights"):
        tensors[name] = tensors[name].detach().to(torch.bfloat16).to(tensors[name].dtype)
    arguments = [*work.backward_arguments(tensors)]
    names = [a.name for a in BACKWARD.default._schema.arguments]
    for name in ("grad_mean", "grad_var", "grad_up_mean"):
        arguments[names.index(name)] = torch.zeros_like(arguments[names.index(name)])
    found, *_ = BACKWARD(*arguments)
    for name in ("grad_out", "source", "out"):
        arguments[names.index(name)] = arguments[names.index(name)].float()
    exact, *_ = BACKWARD(*arguments)
    assert (found != exact.to(dtype)).double().mean() < 0.01


@pytest.mark.parametrize("name", ["predicting", "odd channels", "plain groups", "plain strides"])
def test_predictions_from_bfloat16_are_as_exact_as_in_float32(name: str) -> None:
    """On CPUs with AMX their weights, in float32, are cut into three parts of bfloat16."""
    work = PLAIN[name]
    tensors = work.tensors(torch.bfloat16)
    assert tensors["weights"].dtype == torch.float32
    assert_close(work.run(tensors)[:1], work.reference(tensors), torch.float32)


@each_device
@pytest.mark.parametrize("name", ["all", "plain masks", "without bias"])
def test_gradcheck(name: str, device: str) -> None:
    work = WORKS[name]
    tensors = work.tensors(device=device)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(work.run(dict(zip(tensors, values, strict=True))))

    tolerance = {"cpu": 0.0, "cuda": 1e-10}[device]
    assert torch.autograd.gradcheck(run, tuple(tensors.values()), nondet_tol=tolerance)


@each_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["all", "without bias", "no images"])
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    tensors = WORKS[name].tensors(dtype, device)
    torch.library.opcheck(FORWARD, WORKS[name].arguments(tensors))
    torch.library.opcheck(BACKWARD, WORKS[name].backward_arguments(tensors))


@pytest.mark.parametrize("used", range(4))
def test_gradients_of_one_output_alone(used: int) -> None:
    work = OffsetWork()
    tensors = work.tensors()
    found, expected = (
        dict(zip(tensors, gradients(outs[used], list(tensors.values())), strict=True))
        for outs in (work.run(tensors), work.separately(tensors))
    )
    assert_sums_close(found.pop("source"), expected.pop("source"))
    assert_same_bits(list(found.values()), list(expected.values()))


def test_without_the_bias_of_the_offsets() -> None:
    work = OffsetWork()
    tensors = {name: t for name, t in work.tensors().items() if name != "offset_bias"}
    check(work, torch.float64, tensors)


def test_predictions_have_the_compute_type_and_no_gradient() -> None:
    tensors = OffsetWork().tensors(torch.bfloat16)
    predictions, *others = FORWARD(*OffsetWork().arguments(tensors))
    assert predictions.dtype == torch.float32
    assert not predictions.requires_grad
    assert all(t.requires_grad for t in others)


def test_a_second_derivative_raises() -> None:
    assert_second_derivative_raises(OffsetWork())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_and_runs_give_the_same_bits(dtype: torch.dtype, threads: None) -> None:
    assert_threads_give_the_same_bits(OffsetWork(channels=130, out_channels=70, scale=7), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wanted", list(product((0, 1), repeat=5)))
def test_every_choice_of_gradients(wanted: tuple[int, ...], dtype: torch.dtype) -> None:
    """What is wanted has the same bits as with all others; what is not is empty."""
    torch.manual_seed(0)
    work = OffsetWork()
    *arguments, _, tf32, deterministic = work.backward_arguments(work.tensors(dtype))
    every = BACKWARD(*arguments, [1] * 5, tf32, deterministic)
    found = BACKWARD(*arguments, list(wanted), tf32, deterministic)
    for one, full, want in zip(found, every, wanted, strict=True):
        assert one.dtype == full.dtype
        assert torch.equal(one, full if want else full.new_empty(0))


def products(arguments: Sequence[Any], wanted: list[int]) -> int:
    with FlopCounterMode(display=False) as counter:
        BACKWARD(*arguments, wanted, False, False)
    return counter.get_total_flops() // 2


def test_what_nobody_wants_costs_no_products() -> None:
    work = OffsetWork()
    *arguments, _, _, _ = work.backward_arguments(work.tensors())
    offsets = 27 * 9 * 4 * 2 * (12 + 4)
    jobs = 3 * 9 * 4 * 2 * (12 + 4 + 4 + 2 * 4)
    assert products(arguments, [1] * 5) == 2 * (offsets + jobs)
    assert products(arguments, [0, 0, 0, 1, 1]) == jobs  # the offset convolution is frozen
    assert products(arguments, [1, 0, 0, 0, 0]) == offsets + jobs  # all weights are
    assert products(arguments, [0, 0, 1, 0, 0]) == jobs
    assert products(arguments, [0, 0, 0, 0, 1]) == 0
    with FlopCounterMode(display=False) as counter:
        FORWARD(*work.arguments(work.tensors()))
    assert counter.get_total_flops() == 2 * (offsets + jobs)


def table(name: str) -> int:
    names = [a.name for a in FORWARD.default._schema.arguments]
    return names.index(name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prediction_sizes", [3, 4, 2, 2, 1, 1], "the sizes of the first source maps"),
        ("prediction_sizes", [3, 4, 2, 2, 1, 2, 0, 0], "the sizes of the first source maps"),
        ("prediction_sizes", [3, 4, 2, 2, 1, 3], "prediction maps within 36 rows"),
        ("prediction_sizes", [2, 2, 3, 4], "that a map of 3x4 can read"),
        ("source_sizes", [3, 4, 2, 2, 1, 1], "source maps that cover all"),
        ("geometry", [1, 2, 3, 3, 1, 1, 1, 1], r"expected offset_weight \[54, 4, 3, 3\]"),
        ("images", 3, "source maps within"),
    ],
)
def test_bad_tables_raise(name: str, value: Any, message: str) -> None:
    work = OffsetWork()
    arguments = [*work.arguments(work.tensors())]
    arguments[table(name)] = value
    with pytest.raises(RuntimeError, match=message):
        FORWARD(*arguments)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("source", torch.ones(36, 5, dtype=torch.float64)),
        ("offset_weight", torch.ones(26, 4, 3, 3, dtype=torch.float64)),
        ("offset_weight", torch.ones(27, 4, 3, 3)),
        ("offset_weight", torch.ones(27, 3, 3, 4, dtype=torch.float64).transpose(1, 3)),
        ("offset_bias", torch.ones(26, dtype=torch.float64)),
        ("weights", [torch.ones(3, 4, 3, 3, dtype=torch.float64)] * 2),
        ("weights", []),
        ("bias", [torch.ones(3, dtype=torch.float64)]),
    ],
)
def test_bad_tensors_raise(name: str, bad: Any) -> None:
    work = OffsetWork()
    arguments = [*work.arguments(work.tensors())]
    arguments[table(name)] = bad
    with pytest.raises(RuntimeError, match="expected"):
        FORWARD(*arguments)


@pytest.mark.parametrize("place", range(10))
def test_bad_tensors_raise_in_the_backward(place: int) -> None:
    work = OffsetWork()
    arguments = [*work.backward_arguments(work.tensors())]
    given = arguments[place]
    arguments[place] = [t[:-1] for t in given] if isinstance(given, list) else given[..., :-1]
    with pytest.raises(RuntimeError, match="expected"):
        BACKWARD(*arguments)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_results_of_the_wrapper(dtype: torch.dtype) -> None:
    """Weights of any type; their gradients have the type that they have."""
    work = OffsetWork()
    tensors = {name: leaf(t, dtype) for name, t in work.tensors(dtype).items()}
    out, *moments = work.run(tensors)
    assert out.dtype == dtype
    assert {t.dtype for t in moments} == {compute_dtype(dtype)}
    grads = gradients([out, *moments], list(tensors.values()))
    assert {g.dtype for g in grads} == {dtype}
    assert len(grads) == len(GRADIENTS)

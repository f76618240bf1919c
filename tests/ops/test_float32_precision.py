"""Torch's switch for float32 matrix products with fewer digits, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from dyhead_cuda import backend, functional, library
from dyhead_cuda.numerics import TOLERANCES
from tests.helpers.compare import relative_l2
from tests.helpers.convolutions import PlainConvolution
from tests.helpers.deform_work import PLAIN
from tests.helpers.devices import needs_cpu_library

pytestmark = needs_cpu_library

# Two parts of bfloat16 have 16 digits, and the product of their last ones is left out.
PARTS = 2e-5

CASES = {
    "whole steps": PlainConvolution(in_multiple=64, out_multiple=40, margin=(12, 13)),
    "the end of a step": PlainConvolution(in_multiple=70, out_multiple=33, margin=(9, 8)),
    "groups": PlainConvolution(groups=2, deform_groups=2, in_multiple=36, out_multiple=20),
    "groups that no pair fits": PlainConvolution(groups=2, in_multiple=35, out_multiple=8),
    "one channel": PlainConvolution(in_multiple=1, out_multiple=1, kernel=(1, 1), padding=(0, 0)),
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_of_parts_where_the_switch_allows_them(
    case: PlainConvolution, precision: str
) -> None:
    run = functional.modulated_deform_conv2d
    tensors = replace(case, seed=5).tensors(torch.float32)
    with backend("reference"):
        expected = case.run(run, {key: x.double() for key, x in tensors.items()})
    with backend("cpu"):
        exact = case.run(run, tensors)
        torch.set_float32_matmul_precision(precision)
        found = case.run(run, tensors)
    assert found.dtype == torch.float32
    assert relative_l2(found, expected) < PARTS
    pairs = case.groups == 1 or case.in_multiple % 2 == 0
    assert torch.equal(found, exact) == (library.cpu_capability() != "amx" or not pairs)


def test_only_float32_is_cut() -> None:
    case = CASES["whole steps"]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        tensors = case.tensors(dtype)
        with backend("cpu"):
            torch.set_float32_matmul_precision("highest")
            exact = case.run(functional.modulated_deform_conv2d, tensors)
            torch.set_float32_matmul_precision("high")
            assert torch.equal(case.run(functional.modulated_deform_conv2d, tensors), exact)


@pytest.mark.parametrize("name", ["predicting", "odd channels", "plain groups", "plain strides"])
def test_predictions_from_bfloat16_are_as_exact_as_in_float32(name: str) -> None:
    # With AMX their weights, in float32, are cut in three.
    work = PLAIN[name]
    tensors = work.tensors(torch.bfloat16)
    assert tensors["weights"].dtype == torch.float32
    with backend("cpu"):
        found, *_ = work.run(tensors)
    assert relative_l2(found, work.reference(tensors)[0]) < TOLERANCES["float32"]

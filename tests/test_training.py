"""Training on the CPU: autocast, gradient scaling, half precision, frozen parts, determinism."""

from __future__ import annotations

import pytest
import torch

from dyhead_cuda import DyHead
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset
from tests.helpers import training
from tests.helpers.modules import randomise
from tests.helpers.training import CHANNELS, HALF, KINDS

DEVICE = "cpu"
kinds = pytest.mark.parametrize("kind", KINDS)
half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])


@kinds
@half
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    training.check_autocast(kind, DEVICE, dtype)


@kinds
@half
def test_backward_inside_autocast(kind: str, dtype: torch.dtype) -> None:
    training.check_backward_inside_autocast(kind, DEVICE, dtype)


@kinds
@half
def test_float32_features_under_autocast(kind: str, dtype: torch.dtype) -> None:
    training.check_float32_features_under_autocast(kind, DEVICE, dtype)


@kinds
def test_scaled_step(kind: str) -> None:
    training.check_scaled_step(kind, DEVICE)


@kinds
def test_overflow_is_skipped(kind: str) -> None:
    training.check_overflow_is_skipped(kind, DEVICE)


@kinds
def test_half_precision_module(kind: str) -> None:
    training.check_half_precision_module(kind, DEVICE)


@kinds
def test_frozen_parts(kind: str) -> None:
    training.check_frozen_parts(kind, DEVICE)


@kinds
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_algorithms(kind: str, dtype: torch.dtype) -> None:
    module = training.head(kind).to(dtype)
    randomise(module)
    check_bits(module, dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_deterministic_algorithms_of_every_variant(high_offset: HighOffset) -> None:
    module = DyHead(CHANNELS, CHANNELS, 2, num_groups=4, high_offset=high_offset)
    randomise(module)
    check_bits(module, torch.float32)


def check_bits(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """The same from run to run, for any number of threads, and as without the switch."""
    torch.set_num_threads(1)
    expected = training.trained_bits(module, DEVICE, dtype)
    with training.deterministic():
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found = training.trained_bits(module, DEVICE, dtype)
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(a, b), f"tensor {i} with {threads} threads"

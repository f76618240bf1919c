"""Training on each device: autocast, scaling, half precision, frozen parts, determinism."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch

from dyhead_cuda import DyHead
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset
from tests.helpers import training
from tests.helpers.devices import Device, each_device
from tests.helpers.modules import randomise
from tests.helpers.training import CHANNELS, HALF, KINDS

# cuBLAS reads it when it is first used, and torch demands it of deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

kinds = pytest.mark.parametrize("kind", KINDS)
half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])


@each_device
@kinds
@half
def test_autocast(kind: str, dtype: torch.dtype, device: Device) -> None:
    training.check_autocast(kind, device, dtype)


@each_device
@kinds
@half
def test_backward_inside_autocast(kind: str, dtype: torch.dtype, device: Device) -> None:
    training.check_backward_inside_autocast(kind, device, dtype)


@each_device
@kinds
@half
def test_float32_features_under_autocast(kind: str, dtype: torch.dtype, device: Device) -> None:
    # The same bits are asked for, which on a GPU only deterministic algorithms give.
    with training.deterministic() if device == "cuda" else nullcontext():
        training.check_float32_features_under_autocast(kind, device, dtype)


@each_device
@kinds
def test_scaled_step(kind: str, device: Device) -> None:
    training.check_scaled_step(kind, device)


@each_device
@kinds
def test_overflow_is_skipped(kind: str, device: Device) -> None:
    training.check_overflow_is_skipped(kind, device)


@each_device
@kinds
def test_half_precision_module(kind: str, device: Device) -> None:
    training.check_half_precision_module(kind, device)


@each_device
@kinds
def test_frozen_parts(kind: str, device: Device) -> None:
    training.check_frozen_parts(kind, device)


@each_device
@kinds
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_algorithms(kind: str, dtype: torch.dtype, device: Device) -> None:
    module = training.head(kind).to(dtype)
    randomise(module)
    check_bits(module.to(device), device, dtype)


@each_device
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_deterministic_algorithms_of_every_variant(high_offset: HighOffset, device: Device) -> None:
    module = DyHead(CHANNELS, CHANNELS, 2, num_groups=4, high_offset=high_offset)
    randomise(module)
    check_bits(module.to(device), device, torch.float32)


def check_bits(module: torch.nn.Module, device: Device, dtype: torch.dtype) -> None:
    """The same from run to run, and on the CPU for any number of threads and without the switch."""
    torch.set_num_threads(1)
    with training.deterministic() if device == "cuda" else nullcontext():
        expected = training.trained_bits(module, device, dtype)
    with training.deterministic():
        for threads in (1, 2, 2, 3, 3):
            torch.set_num_threads(threads)
            found = training.trained_bits(module, device, dtype)
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(a, b), f"tensor {i} with {threads} threads"

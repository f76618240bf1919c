"""The forward kernel of deform_conv with wgmma: 16-bit types, in steps of 64 channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.deform_work import WGMMA, WORKS, Call, Convolution

from .arrays import name_of
from .deform_operator import Operator, check

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)


@halves
@pytest.mark.parametrize("processors", [2, 5])
@pytest.mark.parametrize("name", WGMMA)
def test_works(simt: Any, name: str, processors: int, dtype: torch.dtype) -> None:
    """With 2 processors a cluster has all tiles; with 5, clusters share the last ones."""
    check(WGMMA[name], dtype, Operator(simt, processors=processors, wgmma=True))


@halves
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("work", [WGMMA["odd tiles"], WGMMA["groups"]], ids=["tiles", "groups"])
def test_orders_of_threads(simt: Any, work: Call, dtype: torch.dtype) -> None:
    check(work, dtype, Operator(simt, processors=4, wgmma=True))


@halves
@pytest.mark.parametrize(
    ("work", "rows", "cols"),
    [
        (Convolution(channels=72, out_channels=256), 64, 256),
        (Convolution(channels=128, out_channels=256, deform_groups=4), 64, 256),
        (Convolution(channels=64, out_channels=128), 128, 128),
        (Convolution(channels=64, out_channels=256, kernel=(5, 3), padding=(2, 1)), 64, 256),
        (WGMMA["small"], 128, 256),
    ],
    ids=["depth", "deformable groups", "few outputs", "many taps", "taken"],
)
def test_what_the_kernel_does_not_take(
    simt: Any, work: Convolution, rows: int, cols: int, dtype: torch.dtype
) -> None:
    """Such calls have the tiles, and so the bits, that they have without wgmma."""
    device = simt.deform_conv.DeviceLimits(4, 227 * 1024, True)
    tiling = simt.deform_conv.tiling(
        work.plan.tables,
        name_of(dtype),
        work.channels,
        work.out_channels,
        sums_only=False,
        device=device,
    )
    assert tiling[:2] == (rows, cols)
    check(work, dtype, Operator(simt, wgmma=True))


def test_float32_is_not_taken(simt: Any) -> None:
    check(WGMMA["small"], torch.float32, Operator(simt, wgmma=True, allow_tf32=True))
    check(WORKS["all"], torch.float64, Operator(simt, wgmma=True))


def test_the_setting(simt: Any) -> None:
    wants = simt.deform_conv.wants_wgmma
    for setting in (None, "", "auto", "mma"):
        assert not wants(setting, 9, 0, built=True)
    assert wants("wgmma", 9, 0, built=True)
    with pytest.raises(RuntimeError, match=r"to be auto, mma or wgmma, got 'WGMMA'"):
        wants("WGMMA", 9, 0, built=True)
    with pytest.raises(RuntimeError, match=r"compute capability 9.0 .* got 10.0; unset"):
        wants("wgmma", 10, 0, built=True)
    with pytest.raises(RuntimeError, match=r"build it with 90a in DYHEAD_CUDA_ARCHS"):
        wants("wgmma", 9, 0, built=False)

"""Whole blocks on the emulated CUDA kernels, forward and backward, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda import fused, reference
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES, HighOffset, Upsample
from tests.helpers.compare import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    gradients,
    leaf,
    relative_l2,
)
from tests.helpers.inputs import (
    flat_parameters,
    halving_sizes,
    random_block_parameters,
    random_pyramid,
    rebuild_parameters,
)

from .emulated import Emulated

PER_BLOCK = ["offset_deform_conv", "block_coefficients", "fuse_branches"]


def run_block(
    simt: Any,
    dtype: torch.dtype,
    high_offset: HighOffset = "flat",
    *,
    upsample: Upsample = "bilinear",
    parameter_dtype: torch.dtype | None = None,
    channels: int = 16,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs and gradients on the emulation, and those of the reference in float64."""
    features = random_pyramid(2, channels, halving_sizes(9, 12, 3))
    like = random_block_parameters(channels, channels)
    exact = [leaf(t) for t in (*features, *flat_parameters(like))]
    kinds = [dtype] * 3 + [parameter_dtype or dtype] * (len(exact) - 3)
    inputs = [leaf(t, kind) for t, kind in zip(exact, kinds, strict=True)]
    with Emulated(simt) as emulated:
        actual = fused.pyramid_blocks(
            inputs[:3],
            [rebuild_parameters(like, inputs[3:])],
            high_offset=high_offset,
            upsample=upsample,
            num_groups=4,
            eps=1e-5,
            recompute=False,
            memory_format=torch.contiguous_format,
        )
        assert emulated.calls == [f"{name}_fwd" for name in PER_BLOCK]
        grads = gradients(actual, inputs, dtype)
        assert sorted(emulated.calls[3:]) == sorted(f"{name}_bwd" for name in PER_BLOCK)
    rounded = [leaf(t, torch.float64) for t in inputs]
    expected = reference.pyramid_block(
        rounded[:3],
        rebuild_parameters(like, rounded[3:]),
        high_offset=high_offset,
        upsample=upsample,
        num_groups=4,
        eps=1e-5,
    )
    return actual, grads, expected, gradients(expected, rounded, dtype)


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_float64(simt: Any, high_offset: HighOffset, upsample: Upsample) -> None:
    actual, grads, expected, wanted = run_block(simt, torch.float64, high_offset, upsample=upsample)
    assert_close(actual, expected)
    assert_gradients_close(grads, wanted)


def test_float32(simt: Any) -> None:
    actual, grads, expected, wanted = run_block(simt, torch.float32)
    assert_close(actual, expected, torch.float32)
    assert_gradients_close(grads, wanted, torch.float32)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, None], ids=["master weights", "half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(simt: Any, dtype: torch.dtype, parameter_dtype: torch.dtype | None) -> None:
    """Weights of either type; offsets and moments of rounded values make a block less exact."""
    actual, grads, expected, wanted = run_block(simt, dtype, parameter_dtype=parameter_dtype)
    assert [t.dtype for t in actual] == [dtype] * 3
    assert_close(actual, expected, dtype, factor=3)
    assert {g.dtype for g in grads[3:]} == {parameter_dtype or dtype}
    errors = [relative_l2(g, w) for g, w in zip(grads[:3], wanted[:3], strict=True)]
    assert max(errors) < 40 * TOLERANCE[dtype], errors


def test_unified_block(simt: Any) -> None:
    torch.manual_seed(5)
    features = torch.randn(2, 3, 8, 5, 6, dtype=torch.float64)
    weight = torch.randn(3, 8, 8, 3, 3, dtype=torch.float64) / 8
    offset_weight = torch.randn(27, 8, 3, 3, dtype=torch.float64) / 4
    offset_bias = torch.randn(27, dtype=torch.float64)
    gates = torch.rand(2, 3, dtype=torch.float64)
    inputs = [leaf(t) for t in (features, weight, offset_weight, offset_bias, gates)]
    with Emulated(simt):
        x, w, offset_w, offset_b, g = inputs
        actual = fused.spatial_attention(x, w, offset_w, offset_b, "all", g)
        grads = gradients(actual, inputs)
    exact = [leaf(t) for t in inputs]
    expected = reference.spatial_attention(*exact[:4], targets="all", gates=exact[4])
    assert_close(actual, expected)
    assert_gradients_close(grads, gradients(expected, exact))

"""Random parameters and inputs of the paper's form, and its attention on a named backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import backend, functional
from dyhead_cuda.backends import Backend
from dyhead_cuda.reference import UnifiedParameters
from tests.helpers.compare import leaf


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64)


def random_parameters(levels: int, channels: int, out_channels: int) -> UnifiedParameters:
    hidden = max(1, out_channels // 4)
    return UnifiedParameters(
        normal(levels, levels),
        normal(levels, scale=0.3),
        normal(27, channels, 3, 3, scale=(9 * channels) ** -0.5),
        normal(27),
        normal(levels, out_channels, channels, 3, 3, scale=(9 * channels) ** -0.5),
        normal(hidden, out_channels),
        normal(hidden) + 0.5,
        normal(4 * out_channels, hidden),
        normal(4 * out_channels),
    )


def unified_inputs(
    shape: Sequence[int],
    out_channels: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor]:
    """features, weight, offset_weight, offset_bias, gates."""
    n, levels, channels, _, _ = shape
    p = random_parameters(levels, channels, out_channels)
    features = torch.randn(tuple(shape), dtype=torch.float64)
    gates = torch.randn(n, levels, dtype=torch.float64)
    tensors = [features, p.spatial_weight, p.offset_weight, p.offset_bias, gates]
    return [leaf(t.to(device), dtype) for t in tensors]


def attend(name: Backend, tensors: Sequence[Tensor], **options: Any) -> Tensor:
    with backend(name):
        return functional.spatial_attention(*tensors[:4], **options)

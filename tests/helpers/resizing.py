"""Resizing of maps in plain PyTorch, by the modes of the job tables."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import interpolate

from dyhead_cuda.ops.jobs import UpsampleMode


def resized(x: Tensor, size: tuple[int, int], mode: UpsampleMode) -> Tensor:
    """A map [N, C, H, W] of another size."""
    if mode == UpsampleMode.NEAREST:
        return interpolate(x, size, mode="nearest")
    return interpolate(x, size, mode="bilinear", align_corners=True)

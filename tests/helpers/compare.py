"""Tolerances, error measures and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyhead_cuda.numerics import TOLERANCES, gradient_errors
from dyhead_cuda.numerics import relative_l2 as relative_l2

# By type: what numerics.TOLERANCES says by name.
TOLERANCE: dict[torch.dtype, float] = {
    getattr(torch, name): error for name, error in TOLERANCES.items() if name != "tf32"
}


def assert_close(
    actual: Tensor | Sequence[Tensor],
    expected: Tensor | Sequence[Tensor],
    dtype: torch.dtype = torch.float64,
    factor: float = 1,
) -> None:
    """Within ``factor`` times the tolerance of ``dtype``; ``expected`` may be more precise."""
    if isinstance(actual, Tensor) or isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert isinstance(expected, Tensor)
        actual, expected = [actual], [expected]
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = relative_l2(a, b)
        assert error <= factor * TOLERANCE[dtype], f"relative L2 error {error:.3g} of tensor {i}"


def assert_gradients_close(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    dtype: torch.dtype = torch.float64,
    floor: float = 1e-3,
) -> None:
    """Each within twice the tolerance of its own norm, or of ``floor`` times the largest norm.

    The second is for gradients whose terms cancel: that of a bias before a normalisation, for one.
    """
    for i, error in enumerate(gradient_errors(actual, expected, floor)):
        assert error <= 2 * TOLERANCE[dtype], f"gradient {i}: relative L2 error {error:.3g}"


def leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``t`` of its own memory that asks for a gradient."""
    return t.detach().clone().to(dtype or t.dtype).requires_grad_()


def random_like(*tensors: Tensor, seed: int = 99) -> list[Tensor]:
    """Normal values in float64 with the shapes of the tensors."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=source, dtype=torch.float64) for t in tensors]


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    rounded_to: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Gradients of ``inputs`` for random cotangents, equal for equal shapes and ``rounded_to``."""
    outs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    cotangents = [t.to(rounded_to).to(out) for t, out in zip(random_like(*outs), outs, strict=True)]
    return list(torch.autograd.grad(outs, list(inputs), cotangents))

"""Tolerances, error measures and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Relative L2 error against the float64 reference; gradients may have twice that.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN if there is one; absolute upon zeros."""
    assert actual.shape == expected.shape, f"expected {expected.shape}, got {actual.shape}"
    a = actual.detach().double()
    b = expected.detach().to(a.device).double()
    error, size = (a - b).norm(), b.norm()
    return float(error / size) if size > 0 else float(error)


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
    largest = max(float(g.double().norm()) for g in expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, f"gradient {i}: expected {b.shape}, got {a.shape}"
        difference = float((a.double() - b.double()).norm())
        error = difference / max(float(b.double().norm()), floor * largest, 1e-300)
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

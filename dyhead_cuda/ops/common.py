"""What the operators' Python sides share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import older_torch
from dyhead_cuda.ops.transforms import register_autograd


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation type of the kernels: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``t``, contiguous and of the type, if given: no node of a graph where it already is."""
    if not isinstance(t, Tensor):
        raise TypeError(f"expected a tensor, got {type(t).__name__}")
    if dtype is not None and t.dtype != dtype:
        t = t.to(dtype)
    return t if t.is_contiguous() else t.contiguous()


def kernel_weights(
    source: Tensor, weights: Sequence[Tensor], bias: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases as the kernels of deformable jobs read them, beside rows of the source.

    They have the accumulation type. The CUDA kernels read half-precision weights as they are,
    beside half-precision rows.
    """
    kept = source.is_cuda and {w.dtype for w in (*weights, *bias)} == {source.dtype}
    dtype = None if kept else compute_dtype(source.dtype)
    return [dense(w, dtype) for w in weights], [dense(b, dtype) for b in bias]


def unstacked(grad: Tensor | None, dtype: torch.dtype, count: int) -> list[Tensor | None]:
    """The gradients of a list of tensors from the stacked one of a backward operator, or Nones."""
    return [None] * count if grad is None else [*grad.to(dtype).unbind()]


def wanted_gradients(needs: Sequence[bool | Sequence[bool]]) -> list[int]:
    """The argument ``wanted`` of a backward operator: 1 for each gradient that somebody needs.

    Args:
        needs: ``ctx.needs_input_grad`` of the arguments that the gradients belong to, in their
            order; a list of tensors has one gradient, the stacked one of all of them.
    """
    return [int(any(need) if isinstance(need, Sequence) else need) for need in needs]


def forbid_second_derivative(name: str) -> None:
    """Make a backward operator raise, not be silently constant, where it is differentiated."""

    def raise_error(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
        raise RuntimeError(
            f"dyhead::{name} is not differentiable again; use "
            'dyhead_cuda.backend("reference") for second derivatives'
        )

    register_autograd(name, raise_error)


@torch.compiler.assume_constant_result
def tf32_allowed() -> bool:
    """Whether float32 products on CUDA may run in TF32: torch's own switch for matmul."""
    return older_torch.tf32_allowed()

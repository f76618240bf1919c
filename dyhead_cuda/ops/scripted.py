"""The operators under ``torch.jit.trace``, so that a trace serves other sizes than the traced ones.

While it traces, PyTorch has sizes as tensors, and an operator's list of integers would be recorded
as the constants that they are at the moment. A scripted function takes the tensors, and reads them
when the trace runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, List, Optional, Tuple  # noqa: UP035 (of TorchScript)

import torch
from torch import Tensor


def _deform_conv_fwd(
    source: Tensor,
    predictions: Tensor,
    weights: List[Tensor],  # noqa: UP006
    bias: Optional[List[Tensor]],  # noqa: UP006, UP045
    gates: Optional[Tensor],  # noqa: UP045
    images: Tensor,
    source_sizes: List[Tensor],  # noqa: UP006
    prediction_sizes: List[Tensor],  # noqa: UP006
    out_sizes: List[Tensor],  # noqa: UP006
    up_sizes: List[Tensor],  # noqa: UP006
    geometry: List[int],  # noqa: UP006
    terms: List[int],  # noqa: UP006
    jobs: List[int],  # noqa: UP006
    mask_logits: bool,
    out_in_compute_dtype: bool,
    moments: bool,
    allow_tf32: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    return torch.ops.dyhead.deform_conv_fwd(
        source,
        predictions,
        weights,
        bias,
        gates,
        int(images),
        [int(size) for size in source_sizes],
        [int(size) for size in prediction_sizes],
        [int(size) for size in out_sizes],
        [int(size) for size in up_sizes],
        geometry,
        terms,
        jobs,
        mask_logits,
        out_in_compute_dtype,
        moments,
        allow_tf32,
    )


def _offset_deform_conv_fwd(
    source: Tensor,
    offset_weight: Tensor,
    offset_bias: Optional[Tensor],  # noqa: UP045
    weights: List[Tensor],  # noqa: UP006
    bias: Optional[List[Tensor]],  # noqa: UP006, UP045
    images: Tensor,
    source_sizes: List[Tensor],  # noqa: UP006
    prediction_sizes: List[Tensor],  # noqa: UP006
    out_sizes: List[Tensor],  # noqa: UP006
    up_sizes: List[Tensor],  # noqa: UP006
    geometry: List[int],  # noqa: UP006
    terms: List[int],  # noqa: UP006
    jobs: List[int],  # noqa: UP006
    mask_logits: bool,
    allow_tf32: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    return torch.ops.dyhead.offset_deform_conv_fwd(
        source,
        offset_weight,
        offset_bias,
        weights,
        bias,
        int(images),
        [int(size) for size in source_sizes],
        [int(size) for size in prediction_sizes],
        [int(size) for size in out_sizes],
        [int(size) for size in up_sizes],
        geometry,
        terms,
        jobs,
        mask_logits,
        allow_tf32,
    )


def _fuse_branches_fwd(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    coefficients: Tensor,
    images: Tensor,
    branch_sizes: List[Tensor],  # noqa: UP006
    level_sizes: List[Tensor],  # noqa: UP006
    level_branches: List[int],  # noqa: UP006
    up_mode: int,
) -> Tensor:
    return torch.ops.dyhead.fuse_branches_fwd(
        y,
        scale,
        shift,
        coefficients,
        int(images),
        [int(size) for size in branch_sizes],
        [int(size) for size in level_sizes],
        level_branches,
        up_mode,
    )


def _unpack_levels(rows: Tensor, images: Tensor, sizes: List[Tensor]) -> List[Tensor]:  # noqa: UP006
    return torch.ops.dyhead.unpack_levels(rows, int(images), [int(size) for size in sizes])


# name: the function to script, and the arguments that are sizes
_FUNCTIONS: dict[str, tuple[Callable[..., Any], slice]] = {
    "deform_conv_fwd": (_deform_conv_fwd, slice(5, 10)),
    "offset_deform_conv_fwd": (_offset_deform_conv_fwd, slice(5, 10)),
    "fuse_branches_fwd": (_fuse_branches_fwd, slice(4, 7)),
    "unpack_levels": (_unpack_levels, slice(1, 3)),
}


@cache
def _scripted(name: str) -> Any:
    with warnings.catch_warnings():  # PyTorch would rather have torch.export used
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(_FUNCTIONS[name][0])


def _as_tensors(sizes: Any) -> Any:
    if isinstance(sizes, list):
        return [_as_tensors(size) for size in sizes]
    return sizes if isinstance(sizes, Tensor) else torch.tensor(sizes)


def call(name: str, arguments: Sequence[Any]) -> Any:
    """``torch.ops.dyhead.name(*arguments)`` while torch.jit.trace records."""
    if name not in _FUNCTIONS:
        return getattr(torch.ops.dyhead, name)(*arguments)
    given = list(arguments)
    sizes = _FUNCTIONS[name][1]
    given[sizes] = _as_tensors(given[sizes])
    return _scripted(name)(*given)

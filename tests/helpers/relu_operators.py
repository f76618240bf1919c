"""Arguments of ``dyhead::dynamic_relu_fwd`` and ``_bwd``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyhead_cuda.ops.common import compute_dtype


def forward_arguments(inputs: Sequence[Tensor]) -> list[Tensor]:
    """rows [N, P, C] and the parameters as the operator takes them."""
    x, *parameters = inputs
    rows = x.detach().transpose(1, 2).contiguous()
    return [rows, *(t.detach().to(compute_dtype(x.dtype)) for t in parameters)]


def backward_arguments(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of ``dynamic_relu_bwd``, but for its last two."""
    rows, w1, b1, w2, b2 = forward_arguments(inputs)
    _, _, hidden, logits = torch.ops.dyhead.dynamic_relu_fwd(rows, w1, b1, w2, b2, True)
    source = torch.Generator().manual_seed(5)
    grad_out = torch.randn(rows.shape, generator=source, dtype=torch.float64).to(rows)
    return [grad_out, rows, hidden, logits, w1, w2]

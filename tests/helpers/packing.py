"""What ``pack_levels`` should give, by permutations in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dyhead_cuda import fused
from dyhead_cuda.ops.pack_levels import pack_levels
from tests.helpers.compare import leaf, random_like


def expected_rows(levels: list[Tensor]) -> Tensor:
    return torch.cat([x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in levels])


def check(levels: list[Tensor]) -> None:
    """Rows and gradients, from fused.pack too."""
    leaves, exact = [x.detach().requires_grad_() for x in levels], [leaf(x) for x in levels]
    expected = expected_rows(exact)
    cotangent = random_like(expected)[0].to(expected.dtype)
    wanted = torch.autograd.grad(expected, exact, cotangent)
    for pack in (pack_levels, fused.pack):
        rows = pack(leaves)
        assert rows.dtype == expected.dtype
        assert rows.is_contiguous()
        assert torch.equal(rows, expected)
        for actual, grad in zip(torch.autograd.grad(rows, leaves, cotangent), wanted, strict=True):
            assert actual.shape == grad.shape
            assert torch.equal(actual, grad)

"""Maps whose mean is much larger than their deviations from it, on the CPU kernels in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from dyhead_cuda import DyHeadBlock, backend, library
from dyhead_cuda.reference import published
from tests.helpers.compare import relative_l2
from tests.helpers.large_means import CALL, RATIOS, check_moments, tensors_of

library.require("cpu")


@pytest.mark.parametrize("ratio", RATIOS)
def test_moments(ratio: float) -> None:
    check_moments(CALL.run(tensors_of(ratio)), ratio)


def group_norm(y: Tensor, *arguments: Any) -> Tensor:
    return F.group_norm(y.contiguous(), *arguments)


def convolution(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    *geometry, mask = rest
    return deform_conv2d(x, offset.contiguous(), weight, bias, *geometry, mask.contiguous())


@pytest.mark.parametrize("ratio", RATIOS)
def test_blocks_are_as_exact_as_torch_layer_by_layer(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolution, torch's group normalisation and all that follows, each in float32."""
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        block = DyHeadBlock(16, 16, num_groups=4)
        for name, parameter in block.named_parameters():
            scale = 0.1 if name.split(".")[0] in ("offset_conv", "low", "mid", "high") else 0.5
            parameter.data.normal_(0, scale)
            if name in ("low.bias", "mid.bias", "high.bias"):
                parameter.data.normal_(ratio, 0.2)
        x = [torch.randn(2, 16, s, s) for s in (32, 16, 8)]
        with torch.no_grad(), backend("reference"):
            expected = block.double()([t.double() for t in x])
        with torch.no_grad(), backend("cpu"):
            fused = block.float()(x)
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(published, "modulated_deform_conv2d", convolution)
            patch.setattr(published, "_group_norm", group_norm)
            layers = published.pyramid_block(x, block.parameters_tuple(), num_groups=4)
        errors.append([sum(map(relative_l2, found, expected)) for found in (fused, layers)])
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours < 1.3 * theirs

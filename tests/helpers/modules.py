"""Every module by name with inputs for it, and random parameters for any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyhead_cuda import DyHead, DyHeadBlock, DynamicReLU, ModulatedDeformConv2d, UnifiedDyHead
from dyhead_cuda.commands.check_cases import random_parameters
from tests.helpers.inputs import halving_sizes, random_pyramid

MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "DyHead": (
        lambda: DyHead(4, 8, 2, num_groups=2, high_offset="crop", eps=1e-3),
        lambda: (random_pyramid(2, 4, halving_sizes(7, 6, 3), torch.float32),),
    ),
    "DyHeadBlock": (
        lambda: DyHeadBlock(4, 8, num_groups=4, deform_bias=False),
        lambda: (random_pyramid(2, 4, halving_sizes(7, 6, 3), torch.float32),),
    ),
    "UnifiedDyHead": (
        lambda: UnifiedDyHead(3, 8, 2, resize="max"),
        lambda: (torch.randn(2, 3, 8, 4, 5),),
    ),
    "DynamicReLU": (
        lambda: DynamicReLU(8, reduction=2, activation="sigmoid"),
        lambda: (torch.randn(2, 8, 4, 5),),
    ),
    "ModulatedDeformConv2d": (
        lambda: ModulatedDeformConv2d(4, 6, (3, 2), (1, 2), 1, groups=2, deform_groups=2),
        lambda: (torch.randn(2, 4, 5, 6), torch.randn(2, 24, 5, 4), torch.rand(2, 12, 5, 4)),
    ),
}


def randomise(module: nn.Module, seed: int = 3) -> None:
    values = random_parameters(module, seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(values[name])


def as_list(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)

"""The values that parameters of a head start from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dyhead_cuda.modules.published_block import DyHeadBlock

Init = Literal["microsoft", "mmdet", "local"]

# Of "local". A gate starts at 1/2 and three branches are averaged: an own level of 5 gives outputs
# of about 1, as a ReLU after a normalisation does.
OWN_LEVEL, OTHER_LEVELS = 5.0, 1.0  # weights of the normalisations
_RANDOM_SHARE = 0.3  # of the own level's convolution, beside the identity


def reset_deform_weight(weight: Tensor) -> None:
    """Uniform in +-1 / sqrt(fan_in), as the published operator."""
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)


def _normal(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.normal_(layer.weight, 0, 0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def initialise_block(block: DyHeadBlock, init: Init) -> None:
    """What differs between the initialisations; the layers have drawn their own values before.

    Args:
        block: with all its attentions.
        init: see :class:`dyhead_cuda.DyHead`.
    """
    _normal(block.scale_gate)
    if init == "microsoft":
        return
    for parameter in block.offset_conv.parameters():
        nn.init.zeros_(parameter)
    _normal(block.dynamic_relu.fc1)
    _normal(block.dynamic_relu.fc2)
    if init == "local":
        for branch, weight in (
            (block.low, OTHER_LEVELS),
            (block.mid, OWN_LEVEL),
            (block.high, OTHER_LEVELS),
        ):
            nn.init.constant_(branch.norm.weight, weight)
        with torch.no_grad():
            identity = nn.init.dirac_(torch.empty_like(block.mid.weight))
            block.mid.weight.mul_(_RANDOM_SHARE).add_(identity)

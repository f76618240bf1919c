"""Small blocks and heads, to which tests attach what makes them run module by module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda import DyHead, DyHeadBlock
from tests.helpers.compare import assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import randomise

INNER = (
    *(f"{branch}{part}" for branch in ("low", "mid", "high") for part in ("", ".norm")),
    *("offset_conv", "scale_gate", "dynamic_relu", "dynamic_relu.fc1", "dynamic_relu.fc2"),
)
each_inner = pytest.mark.parametrize("inner", INNER)


def make_block(**options: Any) -> DyHeadBlock:
    block = DyHeadBlock(4, 8, **{"num_groups": 2, **options}).double()
    randomise(block)
    return block


def make_head(**options: Any) -> DyHead:
    head = DyHead(4, 8, 3, num_groups=2, **options).double()
    randomise(head)
    return head


def features(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return random_pyramid(2, 4, halving_sizes(9, 6, 3), dtype)


def no_hook(*_: Any) -> None:
    """Changes nothing."""


def assert_equal_to(module: Any, plain: Any) -> None:
    """Outputs and gradients of ``module`` are those of ``plain``, which has the same parameters."""
    results = []
    for each in (module, plain):
        levels = [leaf(x) for x in features()]
        outs = each(levels)
        results.append((outs, gradients(outs, [*levels, *each.parameters()])))
    assert_close(results[0][0], results[1][0])
    assert_gradients_close(results[0][1], results[1][1])

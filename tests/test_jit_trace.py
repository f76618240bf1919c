"""torch.jit.trace: a trace gives the module's numbers, for inputs of any size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import DyHead, ModulatedDeformConv2d, UnifiedDyHead
from dyhead_cuda.pyramid import HighOffset
from tests.helpers.compare import assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import MODULES, as_list, randomise

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class OfTensors(nn.Module):
    """A module with tensors as arguments and results: a tracer takes no list of levels."""

    def __init__(self, module: nn.Module, of_list: bool) -> None:
        super().__init__()
        self.module, self.of_list = module, of_list

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        arguments: tuple[Any, ...] = (list(tensors),) if self.of_list else tensors
        return tuple(as_list(self.module(*arguments)))


@pytest.mark.parametrize("name", MODULES)
def test_a_trace(name: str) -> None:
    make, make_inputs = MODULES[name]
    module, inputs = make(), make_inputs()
    randomise(module)
    of_list = isinstance(inputs[0], list)
    tensors = tuple(inputs[0] if of_list else inputs)
    wrapped = OfTensors(module.requires_grad_(False), of_list)
    trace = torch.jit.trace(wrapped, tensors)
    others = tuple(torch.randn_like(x) for x in tensors)
    for found, expected in zip(trace(*others), wrapped(*others), strict=True):
        assert torch.equal(found, expected)


def pyramid(batch: int, height: int, width: int) -> list[Tensor]:
    return random_pyramid(batch, 8, halving_sizes(height, width, 3), torch.float32)


def stacked(batch: int, height: int, width: int) -> list[Tensor]:
    return [torch.randn(batch, 3, 8, height, width)]


def convolution(batch: int, height: int, width: int) -> list[Tensor]:
    return [torch.randn(batch, channels, height, width) for channels in (8, 18, 9)]


SIZED: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int, int], list[Tensor]]]] = {
    **{
        f"DyHead, {rule}": (
            partial(DyHead, 8, 8, 1, num_groups=4, high_offset=rule, upsample="nearest"),
            pyramid,
        )
        for rule in get_args(HighOffset)
    },
    "UnifiedDyHead": (partial(UnifiedDyHead, 3, 8, 1), stacked),
    "ModulatedDeformConv2d": (partial(ModulatedDeformConv2d, 8, 8, 3, padding=1), convolution),
}


@pytest.mark.parametrize("name", SIZED)
def test_a_trace_serves_other_sizes(name: str) -> None:
    make, inputs_of = SIZED[name]
    module = make()
    randomise(module)
    of_list = inputs_of is pyramid
    trace = torch.jit.trace(OfTensors(module, of_list), tuple(inputs_of(2, 9, 12)))
    for batch, height, width in ((3, 9, 12), (1, 16, 7), (2, 21, 33)):
        tensors = inputs_of(batch, height, width)
        expected = as_list(module(tensors) if of_list else module(*tensors))
        assert_close(list(trace(*tensors)), expected, torch.float32)


def test_a_trace_has_gradients() -> None:
    module = DyHead(8, 8, 1, num_groups=4)
    randomise(module)
    trace = torch.jit.trace(OfTensors(module, True), tuple(pyramid(2, 9, 12)))
    levels = [leaf(x) for x in pyramid(1, 14, 10)]
    wanted = [*levels, *module.parameters()]
    assert_gradients_close(
        gradients(trace(*levels), wanted), gradients(module(levels), wanted), torch.float32
    )

"""torch.jit.trace: a trace gives the module's numbers, for inputs of the sizes it was made with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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

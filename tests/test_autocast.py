"""Autocast: each module computes and returns what it does without, in the type of its inputs.

The rules are the same on every device: ``numerics.no_autocast`` switches autocast off on the device
of the features. ``tests/gpu/test_head.py`` has the case on CUDA.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import DyHeadBlock, backend
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import MODULES, as_list, randomise

REGIONS = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

regions = pytest.mark.parametrize("region", REGIONS, ids=lambda dtype: f"in_{str(dtype)[6:]}")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_module = pytest.mark.parametrize("name", [*MODULES, "UnifiedDyHead of a pyramid", "called"])


def no_hook(*_: Any) -> None:
    """Makes a block call its inner modules."""


def module_and_inputs(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A module with parameters in float32, and inputs for it."""
    pyramid = random_pyramid(2, 8, halving_sizes(7, 6, 3), torch.float32)
    if name == "called":
        module: nn.Module = DyHeadBlock(8, 8, num_groups=4)
        module.get_submodule("low.norm").register_forward_hook(no_hook)
        inputs: tuple[Any, ...] = (pyramid,)
    else:
        make, make_inputs = MODULES[name.partition(" ")[0]]
        module, inputs = make(), make_inputs()
        if name.endswith("of a pyramid"):
            inputs = (pyramid,)
    randomise(module)
    return module, inputs


def cast(x: Any, dtype: torch.dtype) -> Any:
    return [y.to(dtype) for y in x] if isinstance(x, list) else x.to(dtype)


@each_module
@dtypes
@regions
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_same_bits_as_without(
    name: str, dtype: torch.dtype, region: torch.dtype, path: Any
) -> None:
    module, inputs = module_and_inputs(name)
    inputs = tuple(cast(x, dtype) for x in inputs)
    with torch.no_grad(), backend(path):
        expected = as_list(module(*inputs))
        with torch.autocast("cpu", region):
            found = as_list(module(*inputs))
    assert {x.dtype for x in found} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@regions
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_a_convolution_takes_the_type_of_the_region(
    dtype: torch.dtype, region: torch.dtype
) -> None:
    """The other half of the table in docs/numerics.md."""
    x = torch.randn(1, 8, 4, 4).to(dtype)
    with torch.autocast("cpu", region):
        assert nn.Conv2d(8, 8, 3)(x).dtype == region


@regions
def test_a_convolution_is_not_cast_in_float64(region: torch.dtype) -> None:
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", region):
        assert nn.Conv2d(8, 8, 3).double()(x).dtype == torch.float64
        with pytest.raises(RuntimeError, match="should be the same"):
            nn.Conv2d(8, 8, 3)(x)


@regions
def test_a_convolution_before_the_head_decides(region: torch.dtype) -> None:
    """As in a detector: the features come from convolutions, in the type of the region."""
    module, (pyramid,) = module_and_inputs("called")
    convolution = nn.Conv2d(8, 8, 1)
    with torch.no_grad(), torch.autocast("cpu", region):
        levels: list[Tensor] = [convolution(x) for x in pyramid]
        assert {x.dtype for x in module(levels)} == {region}

"""What the reference and the compiled path share, and that unknown names are errors everywhere."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dyhead_cuda
from dyhead_cuda import DyHead, DynamicReLU, functional, numerics, reference
from dyhead_cuda.inspect import record
from dyhead_cuda.modules import UnifiedDyHeadBlock
from dyhead_cuda.ops.dynamic_relu import dynamic_relu as compiled_dynamic_relu
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES
from tests.helpers.inputs import halving_sizes, random_block_parameters, random_pyramid
from tests.helpers.paths import ROOT


def test_functional_imports_the_reference_to_run_it_and_nothing_from_it() -> None:
    tree = ast.parse((ROOT / "dyhead_cuda" / "functional.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "dyhead_cuda" in modules
    assert not [name for name in modules if name and "reference" in name]


def test_names_that_moved_are_still_public_in_the_reference() -> None:
    for name in ("Activation", "ResizeMode", "Targets", "UnifiedParameters", "hsigmoid"):
        assert name in reference.__all__
        assert getattr(reference, name) is getattr(numerics, name)
    assert reference.median_level is numerics.median_level


@pytest.mark.parametrize("name", ["BlockParameters", "BranchParameters", "HighOffset", "Upsample"])
def test_what_functions_take_is_exported(name: str) -> None:
    assert name in dyhead_cuda.__all__
    assert hasattr(dyhead_cuda, name)


LEVELS = random_pyramid(1, 4, halving_sizes(8, 6, 3))
PARAMETERS = random_block_parameters(4, 8)
F5 = torch.randn(1, 3, 4, 5, 6, dtype=torch.float64)
OFFSET, MASK = torch.randn(1, 18, 8, 6), torch.rand(1, 9, 8, 6)
RELU = DynamicReLU(4).double()
RELU_PARAMETERS = (RELU.fc1.weight, RELU.fc1.bias, RELU.fc2.weight, RELU.fc2.bias)
SPATIAL = (
    torch.randn(3, 4, 4, 3, 3).double(),
    torch.randn(27, 4, 3, 3).double(),
    MASK.new_zeros(27),
)
ROWS = torch.randn(1, 5, 4).double()


def unified_block(targets: Any) -> Tensor:
    block = UnifiedDyHeadBlock(3, 4).double()
    return functional.unified_block(F5, block.parameters_tuple(), targets)


CALLS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "high_offset_and_mask": (
        lambda name: reference.high_offset_and_mask(OFFSET, MASK, (4, 3), name),
        ("flat", "crop", "mmdet_main"),
    ),
    "branch_maps": (
        lambda name: reference.branch_maps(LEVELS, PARAMETERS, high_offset=name, num_groups=2),
        HIGH_OFFSETS,
    ),
    "branch_maps upsample": (
        lambda name: reference.branch_maps(LEVELS, PARAMETERS, upsample=name, num_groups=2),
        UPSAMPLES,
    ),
    "branch_maps of one level": (
        lambda name: reference.branch_maps(LEVELS[:1], PARAMETERS, high_offset=name, num_groups=2),
        HIGH_OFFSETS,
    ),
    "resize": (lambda name: numerics.resize(LEVELS[0], (4, 3), name), UPSAMPLES),
    "target_levels": (lambda name: numerics.target_levels(name, 3), ("all", "median")),
    "unified_block": (unified_block, ("all", "median")),
    "reference.spatial_attention": (
        lambda name: reference.spatial_attention(F5, *SPATIAL, targets=name),
        ("all", "median"),
    ),
    "reference.dynamic_relu": (
        lambda name: reference.dynamic_relu(LEVELS[0], *RELU_PARAMETERS, activation=name),
        ("hsigmoid", "sigmoid"),
    ),
    "task_attention": (
        lambda name: functional.task_attention(F5, *RELU_PARAMETERS, activation=name),
        ("hsigmoid", "sigmoid"),
    ),
    "the compiled dynamic_relu": (
        lambda name: compiled_dynamic_relu(ROWS, *RELU_PARAMETERS, name),
        ("hsigmoid", "sigmoid"),
    ),
    "stack_pyramid": (
        lambda name: functional.stack_pyramid(LEVELS, name),
        ("bilinear", "nearest", "max"),
    ),
    "init": (lambda name: DyHead(16, 16, 1, init=name), ("microsoft", "mmdet")),
    "attentions": (
        lambda name: DyHead(16, 16, 1, attentions=[name]),
        ("scale", "spatial", "task"),
    ),
    "attentions as a word": (
        lambda name: DyHead(16, 16, 1, attentions=name),
        ("scale", "spatial", "task"),
    ),
    "samples": (
        lambda name: record.samples(
            record.record(DyHead(4, 16, 1).double(), LEVELS[:1])[0], 0, 1, 1, name
        ),
        HIGH_OFFSETS,
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["bogus", "mmdet-main", "", None])
def test_an_unknown_name_is_an_error_that_lists_the_names(call: str, name: Any) -> None:
    function, names = CALLS[call]
    with pytest.raises(ValueError, match=re.escape(repr(name))) as error:
        function(name)
    assert all(repr(known) in str(error.value) for known in names)


def test_errors() -> None:
    ours, wanted = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    assert numerics.relative_l2(ours, wanted) == 0.1
    assert numerics.relative_l2(ours, wanted, floor=50) == 0.01
    assert numerics.relative_l2(ours - 3, ours - ours) == 1.5  # absolute
    assert math.isnan(numerics.relative_l2(ours * math.nan, wanted))
    with pytest.raises(ValueError, match="expected the shape"):
        numerics.relative_l2(ours, wanted[None])
    found = [torch.tensor([100.0]), torch.tensor([0.01])]
    errors = numerics.gradient_errors(found, [torch.tensor([100.0]), torch.tensor([0.0])])
    assert errors == pytest.approx([0, 0.1])

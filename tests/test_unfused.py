"""A block that runs module by module gives the numbers of the fused one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dyhead_cuda import backend
from dyhead_cuda.modules import ATTENTIONS
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES, HighOffset, Upsample
from tests.helpers.compare import assert_close
from tests.helpers.inputs import random_pyramid
from tests.helpers.unfused import assert_equal_to, each_inner, features, make_block, no_hook


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("deform_bias", [True, False])
def test_same_numbers(high_offset: HighOffset, upsample: Upsample, deform_bias: bool) -> None:
    plain = make_block(high_offset=high_offset, upsample=upsample, deform_bias=deform_bias)
    block = copy.deepcopy(plain)
    block.scale_gate.register_forward_hook(no_hook)
    assert_equal_to(block, plain)


@pytest.mark.parametrize("attentions", [(), ATTENTIONS[:1], ATTENTIONS[1:2], ATTENTIONS[2:]])
def test_same_numbers_where_attentions_are_left_out(attentions: Any) -> None:
    plain = make_block(attentions=attentions)
    block = copy.deepcopy(plain)
    block.mid.register_forward_hook(no_hook)
    assert_equal_to(block, plain)


@each_inner
def test_every_inner_module_counts(inner: str) -> None:
    plain = make_block()
    block = copy.deepcopy(plain)
    block.get_submodule(inner).register_forward_pre_hook(no_hook)
    assert block.unfused_reason() is not None
    assert_equal_to(block, plain)


def test_any_sizes_with_aligned() -> None:
    levels = random_pyramid(2, 4, [(9, 7), (4, 5), (3, 1)])
    plain = make_block(high_offset="aligned")
    block = copy.deepcopy(plain)
    block.low.register_forward_hook(no_hook)
    assert_close(block(levels), plain(levels))


@pytest.mark.parametrize("sizes", [[(1, 1)], [(2, 2), (1, 1)], [(0, 3)]])
@pytest.mark.parametrize("images", [0, 1])
def test_tiny_and_empty_levels(images: int, sizes: list[tuple[int, int]]) -> None:
    plain = make_block(num_groups=8)  # one value per group on a level of one pixel
    block = copy.deepcopy(plain)
    block.low.register_forward_hook(no_hook)
    levels = random_pyramid(images, 4, sizes)
    assert_close(block(levels), plain(levels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    exact = make_block()
    block = copy.deepcopy(exact).to(dtype)
    block.low.register_forward_hook(no_hook)
    levels = features(dtype)
    outs = block(levels)
    assert {x.dtype for x in outs} == {dtype}
    # In a half type the offsets are rounded, too.
    expected = copy.deepcopy(block).double()([x.double() for x in levels])
    assert_close(outs, expected, dtype, factor=20)


def test_autocast_computes_in_the_type_of_the_parameters() -> None:
    plain = make_block().float()
    block = copy.deepcopy(plain)
    block.low.register_forward_hook(no_hook)
    levels = features(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        outs = block(levels)
        assert {x.dtype for x in outs} == {torch.bfloat16}
        assert_close(outs, plain(levels), torch.bfloat16)


def test_on_the_reference() -> None:
    plain = make_block()
    block = copy.deepcopy(plain)
    block.low.register_forward_hook(no_hook)
    with backend("reference"):
        outs = block(features())
    assert_close(outs, plain(features()))

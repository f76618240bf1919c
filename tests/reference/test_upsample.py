"""The resizing of the coarser branch: bilinear as published, nearest as public forks have it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dyhead_cuda
from dyhead_cuda import DyHead, functional, numerics, reference
from dyhead_cuda.modules import DyHeadBlock
from dyhead_cuda.pyramid import BlockParameters, HighOffset
from dyhead_cuda.reference import published

SIZES = ((9, 7), (5, 4), (3, 2))


def levels(sizes: Any = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 16, *s, generator=generator, dtype=torch.float64) for s in sizes]


def head(upsample: Any, high_offset: HighOffset = "flat") -> DyHead:
    torch.manual_seed(0)
    model = DyHead(16, 16, 1, upsample=upsample, high_offset=high_offset).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def parameters_of(model: DyHead) -> BlockParameters:
    block = model.blocks[0]
    assert isinstance(block, DyHeadBlock)
    return block.parameters_tuple()


@pytest.mark.parametrize("high_offset", ["flat", "crop", "mmdet_main", "aligned"])
def test_nearest_repeats_pixels_of_the_coarser_branch(high_offset: HighOffset) -> None:
    features, parameters = levels(), parameters_of(head("nearest", high_offset))
    maps = published.branch_maps(features, parameters, high_offset=high_offset, upsample="nearest")
    smooth = published.branch_maps(features, parameters, high_offset=high_offset)
    for level, branches in enumerate(maps):
        for name, branch in branches.items():
            same = torch.equal(branch, smooth[level][name])
            assert same == (name != "high"), (level, name)
    if high_offset == "aligned":
        return
    # Each row and column of the coarser map is repeated: floor(i * h / H) as F.interpolate has it.
    tall = maps[0]["high"]
    rows = [i * 5 // 9 for i in range(9)]
    for i in range(8):
        assert torch.equal(tall[:, :, i], tall[:, :, i + 1]) == (rows[i] == rows[i + 1])


def test_nearest_is_the_default_of_interpolate() -> None:
    x = levels()[1]
    assert torch.equal(numerics.resize(x, (9, 7), "nearest"), F.interpolate(x, (9, 7)))
    bilinear = F.interpolate(x, (9, 7), mode="bilinear", align_corners=True)
    assert torch.equal(numerics.resize(x, (9, 7), "bilinear"), bilinear)


def test_the_low_branch_stays_bilinear_where_sizes_do_not_fit() -> None:
    """Sizes that are not halves exist only for "aligned", which no fork with "nearest" computes."""
    features, model = levels(((9, 7), (4, 3))), head("nearest", "aligned")
    parameters = parameters_of(model)
    low = [
        published.branch_maps(features, parameters, high_offset="aligned", upsample=mode)[1]["low"]
        for mode in ("bilinear", "nearest")
    ]
    assert torch.equal(*low)


def test_heads_take_it_and_show_it() -> None:
    features, model = levels(), head("nearest")
    assert "upsample='nearest'" in repr(model)
    expected = reference.pyramid_block(features, parameters_of(model), upsample="nearest")
    for x, y in zip(model(features), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    other = head("bilinear")(features)
    assert (other[0] - expected[0]).norm() > 1e-2 * expected[0].norm()


def test_unknown_names_are_refused() -> None:
    features, model = levels(), head("nearest")
    parameters = parameters_of(model)
    bogus: Any = "bicubic"
    for call in (
        lambda: DyHead(16, 16, 1, upsample=bogus),
        lambda: functional.pyramid_block(features, parameters, upsample=bogus),
        lambda: reference.pyramid_block(features, parameters, upsample=bogus),
        lambda: published.branch_maps(features, parameters, upsample=bogus),
    ):
        with pytest.raises(ValueError, match=r"'bilinear', 'nearest'\), got 'bicubic'"):
            call()


def test_nearest_computes_the_same_on_every_backend(caplog: pytest.LogCaptureFixture) -> None:
    features, model = levels(), head("nearest")
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        found = model(features)
    with dyhead_cuda.backend("reference"):
        expected = model(features)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)

"""accelerate(model) measures what it replaces: forks get their own numbers or stay as they were."""

from __future__ import annotations

import copy
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import accelerate
from dyhead_cuda.compat import measure, structure
from dyhead_cuda.compat.accelerate import AcceleratedBlock
from dyhead_cuda.compat.names import GLIP
from tests.helpers.published import glip, glip_language, mmdet, mmdet_main
from tests.helpers.published.forks import fork
from tests.helpers.published_models import CHANNELS, glip_model, pyramid, randomised


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    difference = torch.cat([(x - y).flatten() for x, y in zip(found, expected, strict=True)])
    return float(difference.norm() / torch.cat([y.flatten() for y in expected]).norm())


@torch.no_grad()
def run(block: nn.Module, name: str, levels: list[Tensor]) -> list[Tensor]:
    if name == "cropped":
        return block({"visual": levels, "lang": None})["visual"]
    return list(block(dict(enumerate(levels))).values())


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()


def even_pyramid() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((8, 12), (4, 6), (2, 3))
    return [torch.randn(2, CHANNELS, *s, generator=generator, dtype=torch.float64) for s in sizes]


@pytest.mark.parametrize(
    ("name", "high_offset", "upsample"),
    [
        ("nearest", "flat", "nearest"),
        ("cropped", "crop", "bilinear"),
        ("aligned", "aligned", "bilinear"),
        ("doubled", "flat", "nearest"),
    ],
)
def test_forks_get_the_variant_they_compute(
    name: str, high_offset: str, upsample: str, caplog: pytest.LogCaptureFixture
) -> None:
    block, levels = randomised(fork(name, CHANNELS)), even_pyramid()
    expected = run(block, name, levels)
    with caplog.at_level(logging.INFO, "dyhead_cuda"):
        fast = accelerate(nn.Sequential(block))[0]
    assert isinstance(fast, AcceleratedBlock)
    assert (fast.high_offset, fast.upsample) == (high_offset, upsample)
    assert relative(run(fast, name, levels), expected) < 1e-12
    assert f'high_offset "{high_offset}"' in caplog.text
    assert ('upsample "nearest"' in caplog.text) == (upsample == "nearest")
    assert "measured: equal" in caplog.text


def test_a_fork_that_no_variant_computes_stays(caplog: pytest.LogCaptureFixture) -> None:
    block, levels = randomised(fork("half_pixel", CHANNELS)), pyramid()
    expected = run(block, "half_pixel", levels)
    model = nn.Sequential(block)
    accelerate(model)
    assert model[0] is block
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "left as it was: 0 (DyConv), because its own forward computes" in record.getMessage()
    assert 'the closest variant (high_offset "flat") is off by' in record.getMessage()
    assert "high_offset=..." in record.getMessage()
    assert relative(run(model[0], "half_pixel", levels), expected) == 0


def test_a_changed_sum_stays(caplog: pytest.LogCaptureFixture) -> None:
    def forward(self: Any, x: list[Tensor]) -> list[Tensor]:
        return [2 * self.run_level(x, level) for level in range(len(x))]

    block = type("DyConv", (glip.DyConvStructure,), {"forward": forward})(CHANNELS, CHANNELS)
    model = accelerate(nn.Sequential(block))
    assert model[0] is block
    assert "off by 5.0e-01" in caplog.text


def test_outputs_of_other_shapes_stay(caplog: pytest.LogCaptureFixture) -> None:
    def forward(self: Any, x: list[Tensor]) -> list[Tensor]:
        return [self.run_level(x, 0)]

    block = type("DyConv", (glip.DyConvStructure,), {"forward": forward})(CHANNELS, CHANNELS)
    assert accelerate(nn.Sequential(block))[0] is block
    assert "off by inf" in caplog.text


def test_a_block_that_cannot_run_here_is_not_verified(caplog: pytest.LogCaptureFixture) -> None:
    fast = accelerate(nn.Sequential(fork("gpu_only", CHANNELS)))[0]
    assert isinstance(fast, AcceleratedBlock)
    assert fast.high_offset == "flat"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "not verified: its own forward does not run here: RuntimeError" in record.getMessage()
    assert "not implemented on the CPU" in record.getMessage()


def test_blocks_on_the_meta_device_are_not_verified(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = nn.Sequential(glip.DyConv(CHANNELS, CHANNELS))
    assert isinstance(accelerate(model)[0], AcceleratedBlock)
    assert "not verified: its parameters are on the meta device" in caplog.text


def test_a_block_that_cannot_be_copied_is_not_verified(caplog: pytest.LogCaptureFixture) -> None:
    block = glip.DyConv(CHANNELS, CHANNELS)
    block.handle = open  # type: ignore[assignment]
    block.cache = torch.ones(2, requires_grad=True) * 2  # deepcopy refuses what has a history
    assert isinstance(accelerate(nn.Sequential(block))[0], AcceleratedBlock)
    assert "not verified: it cannot be copied in float64: RuntimeError" in caplog.text


def test_a_forward_that_takes_something_else_stays(caplog: pytest.LogCaptureFixture) -> None:
    def forward(self: Any, *x: Tensor) -> list[Tensor]:
        return [self.run_level(list(x), level) for level in range(len(x))]

    block = type("DyConv", (glip.DyConvStructure,), {"forward": forward})(CHANNELS, CHANNELS)
    assert accelerate(nn.Sequential(block))[0] is block
    assert "its forward takes no list or dict of levels that a public block takes" in caplog.text


def test_where_the_fused_block_cannot_run_it_is_not_verified(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no float64 here")

    monkeypatch.setattr(measure.functional, "pyramid_block", broken)
    accelerate(nn.Sequential(glip.DyConv(CHANNELS, CHANNELS)))
    assert "not verified: the fused block does not run here in float64: Runt" in caplog.text


def test_what_stands_beside_the_levels_is_passed_on() -> None:
    block = accelerate(randomised(glip_language.DyConv(CHANNELS, CHANNELS)))
    mask = object()
    out = block({"visual": pyramid(), "lang": None, "masks": mask})
    assert list(out) == ["visual", "lang", "masks"]
    assert out["masks"] is mask


def test_verification_can_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    block = fork("half_pixel", CHANNELS)
    block.register_forward_hook(lambda *_: pytest.fail("the block was run"))
    with caplog.at_level(logging.INFO, "dyhead_cuda"):
        fast = accelerate(nn.Sequential(block), verify=False)[0]
    assert isinstance(fast, AcceleratedBlock)
    assert "not verified (verify=False)" in caplog.text


def test_a_variant_that_was_asked_for_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    block = randomised(glip.DyConv(CHANNELS, CHANNELS))
    fast = accelerate(nn.Sequential(block), upsample="nearest")[0]
    assert isinstance(fast, AcceleratedBlock)
    assert fast.upsample == "nearest"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "as asked for, the block's own forward differs by" in record.getMessage()
    # What is asked for narrows the search, which still finds the rest.
    main = randomised(mmdet_main.DyHeadBlock(CHANNELS, CHANNELS))
    fast = accelerate(nn.Sequential(main), upsample="bilinear")[0]
    assert isinstance(fast, AcceleratedBlock)
    assert fast.high_offset == "mmdet_main"
    with pytest.raises(ValueError, match=r"upsample .*'bilinear', 'nearest'\), got 'bicubic'"):
        accelerate(main, upsample="bicubic")  # type: ignore[arg-type]


def test_nothing_of_the_model_is_touched() -> None:
    model = glip_model().train()
    block = model.get_submodule("dyhead_tower.0")
    calls: list[str] = []

    class Holder:
        """What a hook is bound to; a copy of it would take the whole model along."""

        def hook(self, *_: Any) -> None:
            calls.append("called")

        def __deepcopy__(self, memo: Any) -> Any:
            pytest.fail("a hook was copied")

    block.register_forward_hook(Holder().hook)
    block.register_forward_pre_hook(Holder().hook)
    block.register_buffer("counter", torch.zeros(()))

    def forward(self: Any, x: list[Tensor]) -> list[Tensor]:
        self.counter += 1
        return [self.run_level(x, i) + torch.rand(()) + random.random() for i in range(len(x))]

    block.__class__ = type("DyConv", (glip.DyConvStructure,), {"forward": forward})
    state, training = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks = dict(block._forward_hooks), dict(block._forward_pre_hooks)
    states = (
        torch.get_rng_state(),
        random.getstate(),
        numpy_state(),
    )
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy_state() == states[2]
    assert not calls
    assert (dict(block._forward_hooks), dict(block._forward_pre_hooks)) == hooks
    assert [m.training for m in model.modules()] == training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_it_is_measured_with_random_parameters() -> None:
    """A fresh block of mmdet's has offsets of zero, with which "flat" and "crop" are the same.

    Reading its forward, which only calls another one, tells "flat", the first that is tried.
    """

    def forward(self: Any, x: Any) -> list[Tensor]:
        return mmdet_main.DyHeadBlock.forward(self, x)

    made = type("DyHeadBlock", (mmdet.DyHeadBlockStructure,), {"forward": forward})
    block = made(CHANNELS, CHANNELS)
    assert structure.published_high_offset(block) == "flat"
    fast = accelerate(nn.Sequential(block))[0]
    assert isinstance(fast, AcceleratedBlock)
    assert fast.high_offset == "mmdet_main"
    assert not block.spatial_conv_offset.weight.any()


def test_the_source_is_not_needed_to_tell_variants_apart() -> None:
    """mmdet_main's forward under names that reading it does not know."""

    def forward(self: Any, x: Any) -> list[Tensor]:
        return mmdet_main.DyHeadBlock.forward(self, x)

    block = type("DyHeadBlock", (mmdet.DyHeadBlockStructure,), {"forward": forward})
    made = block(CHANNELS, CHANNELS)
    assert structure.published_high_offset(made) == "flat"
    fast = accelerate(nn.Sequential(made))[0]
    assert isinstance(fast, AcceleratedBlock)
    assert fast.high_offset == "mmdet_main"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_measured_in_float64(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(randomised(glip.DyConv(CHANNELS, CHANNELS)).to(dtype))
    with caplog.at_level(logging.INFO, "dyhead_cuda"), torch.autocast("cpu", torch.bfloat16):
        accelerate(model)
    assert "measured: equal to 1e-09" in caplog.text
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_reading_a_forward_tells_its_resizing() -> None:
    nearest = fork("nearest", CHANNELS)
    assert structure.published_upsample(nearest) == "bilinear"  # a method called by the forward

    def bare(self: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x, size=[2, 2])

    def named(self: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x, size=[2, 2], mode="bilinear")

    for forward, expected in ((bare, "nearest"), (named, "bilinear")):
        block = type("DyConv", (glip.DyConvStructure,), {"forward": forward})(CHANNELS, CHANNELS)
        assert structure.published_upsample(block) == expected
        fast = accelerate(nn.Sequential(block), verify=False)[0]
        assert isinstance(fast, AcceleratedBlock)
        assert fast.upsample == expected


def test_operators_that_refuse_other_sizes_tell_how_offsets_are_read() -> None:
    assert structure.published_high_offset(fork("aligned", CHANNELS)) == "aligned"
    block = fork("cropped", CHANNELS)
    assert structure.published_high_offset(block) == "flat"
    operator = type(block.get_submodule("DyConv.0.conv"))
    renamed = type(operator.__name__, (operator,), {"__module__": "detectron2.layers.deform_conv"})
    block.get_submodule("DyConv.0.conv").__class__ = renamed
    assert structure.published_high_offset(block) == "crop"


def test_the_measurement_says_how_close_it_came() -> None:
    block = fork("half_pixel", CHANNELS)
    first = measure.Variant("flat", "bilinear")
    every = measure.variants(first, None, None)
    assert every[0] == first
    assert len(set(every)) == 8
    found = measure.measure(block, GLIP, every)
    assert not found.agrees
    assert 1e-3 < found.error < 1
    assert measure.variants(first, "crop", None) == [("crop", "bilinear"), ("crop", "nearest")]

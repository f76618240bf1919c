"""The adapters for mmdet and detectron2, with minimal stand-ins for those packages."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import compat
from dyhead_cuda.compat.accelerate import AcceleratedDyHeadBlock
from tests.helpers.published import mmdet, mmdet_main
from tests.helpers.published_models import CHANNELS, assert_close, assert_same, pyramid, randomised


class Registry:
    """What is used of the registries of mmengine and fvcore."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def register_module(self) -> Callable[[Any], Any]:
        return self.register()

    def register(self) -> Callable[[Any], Any]:
        def add(thing: Any) -> Any:
            self.entries[thing.__name__] = thing
            return thing

        return add

    def get(self, name: str) -> Any:
        return self.entries[name]


@pytest.fixture
def module_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., types.ModuleType]]:
    """Puts modules in ``sys.modules`` and takes the adapters out again."""

    def make(name: str, **contents: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    adapters = ("dyhead_cuda.compat.mmdet", "dyhead_cuda.compat.detectron2")
    for name in adapters:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield make
    for name in adapters:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("neck", [mmdet.DyHead, mmdet_main.DyHead])
def test_the_neck_of_mmdet(module_of: Any, neck: type[mmdet.DyHead]) -> None:
    registry = Registry()
    module_of("mmdet")
    module_of("mmdet.registry", MODELS=registry)
    module_of("mmdet.models")
    module_of("mmdet.models.necks", DyHead=neck)
    importlib.import_module("dyhead_cuda.compat.mmdet")
    made = registry.get("FusedDyHead")(
        CHANNELS, CHANNELS, num_blocks=2, zero_init_offset=False, recompute=True
    )
    assert isinstance(made, neck)
    blocks = list(made.dyhead_blocks)
    assert all(isinstance(block, AcceleratedDyHeadBlock) for block in blocks)
    assert {block.recompute for block in blocks} == {True}
    own = randomised(neck(CHANNELS, CHANNELS, 2, zero_init_offset=False))
    assert list(made.state_dict()) == list(own.state_dict())
    made.double().load_state_dict(own.state_dict())
    levels = tuple(pyramid())
    outs = made(levels)
    assert isinstance(outs, tuple)
    assert_close(list(outs), list(own(levels)))
    assert_same(dict(made.state_dict()), dict(own.state_dict()))


def test_a_neck_that_cannot_be_fused_says_so(module_of: Any) -> None:
    class Changed(mmdet.DyHeadBlock):
        def forward(self, x: Any) -> list[Tensor]:
            return [2 * out for out in super().forward(x)]

    class Neck(mmdet.DyHead):
        block = Changed

    registry = Registry()
    module_of("mmdet")
    module_of("mmdet.registry", MODELS=registry)
    module_of("mmdet.models")
    module_of("mmdet.models.necks", DyHead=Neck)
    importlib.import_module("dyhead_cuda.compat.mmdet")
    with pytest.raises(RuntimeError, match=r'blocks 0, 1 were left; .*use type="DyHead"'):
        registry.get("FusedDyHead")(CHANNELS, CHANNELS, num_blocks=2)


class ShapeSpec(NamedTuple):
    channels: int
    stride: int


class Backbone(nn.Module):
    """detectron2's base class."""

    @property
    def size_divisibility(self) -> int:
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": 0}


class Pyramid(Backbone):
    """Levels of 8, 16 and 32 pixels, listed in another order than theirs."""

    def __init__(self, widths: tuple[int, ...] = (CHANNELS,) * 3) -> None:
        super().__init__()
        self.widths = widths
        self.convs = nn.ModuleList(
            nn.Conv2d(3, width, stride, stride)
            for width, stride in zip(widths, (32, 16, 8), strict=True)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {f"p{5 - i}": conv(images) for i, conv in enumerate(self.convs)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{5 - i}": ShapeSpec(width, 32 >> i) for i, width in enumerate(self.widths)}


class CfgNode(dict):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


@pytest.fixture
def detectron2(module_of: Any) -> Any:
    registry = Registry()
    registry.entries["build_retinanet_resnet_fpn_backbone"] = lambda cfg, shape: Pyramid()
    module_of("detectron2")
    module_of("detectron2.config", CfgNode=CfgNode)
    module_of("detectron2.layers", ShapeSpec=ShapeSpec)
    module_of("detectron2.modeling", BACKBONE_REGISTRY=registry, Backbone=Backbone)
    adapter: Any = importlib.import_module("dyhead_cuda.compat.detectron2")
    adapter.registry = registry
    return adapter


def test_the_backbone_of_detectron2(detectron2: Any) -> None:
    cfg: Any = CfgNode(MODEL=CfgNode())
    detectron2.add_dyhead_config(cfg)
    cfg.MODEL.DYHEAD.NUM_CONVS, cfg.MODEL.DYHEAD.CHANNELS = 2, 48
    build = detectron2.registry.get("build_fused_dyhead_backbone")
    model = build(cfg, ShapeSpec(3, 1))
    assert len(model.dyhead.blocks) == 2
    shapes = model.output_shape()
    assert list(shapes) == ["p3", "p4", "p5"]
    assert shapes["p4"] == ShapeSpec(48, 16)
    assert model.size_divisibility == 32
    assert model.padding_constraints == {"square_size": 0, "size_divisibility": 32}
    images = torch.randn(1, 3, 64, 96)
    outs = model(images)
    assert {name: list(x.shape) for name, x in outs.items()} == {
        "p3": [1, 48, 8, 12],
        "p4": [1, 48, 4, 6],
        "p5": [1, 48, 2, 3],
    }
    inner = model.backbone(images)
    expected = model.dyhead([inner[name] for name in shapes])
    assert_close(list(outs.values()), expected)


def test_checkpoints_of_dynamichead_load_into_it(detectron2: Any) -> None:
    source, model = (
        detectron2.DyHeadBackbone(Pyramid(), channels=CHANNELS, num_blocks=2) for _ in range(2)
    )
    backbone = {k: v for k, v in source.state_dict().items() if k.startswith("backbone.")}
    theirs = backbone | compat.to_microsoft(source.dyhead)
    before = dict(theirs)
    result = model.load_state_dict(theirs)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(dict(model.state_dict()), dict(source.state_dict()))
    assert_same(theirs, before)
    # Inside a detector, and with its own names.
    outer = nn.ModuleDict({"backbone": model})
    outer.load_state_dict({f"backbone.{key}": value for key, value in theirs.items()})
    model.load_state_dict(source.state_dict())
    theirs["dyhead_tower.2.offset.bias"] = torch.ones(27)
    with pytest.raises(RuntimeError, match=r"dyhead_tower\.2\.offset\.bias"):
        model.load_state_dict(theirs)


def test_levels_of_several_widths_are_refused(detectron2: Any) -> None:
    with pytest.raises(ValueError, match=r"got \[16, 32\] on \['p3', 'p4', 'p5'\]; put a feature"):
        detectron2.DyHeadBackbone(Pyramid((16, 32, 16)))

"""Every detector from its configuration: trains, predicts, is repeatable, and what it costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18

from dyhead_cuda.detection.models import (
    ModelConfig,
    build,
    build_empty,
    count_parameters,
    gflops,
)
from dyhead_cuda.detection.names import DETECTORS, ONE_STAGE
from dyhead_cuda.modules import ATTENTIONS, DynamicReLU
from tests.helpers.detection.small_scenes import empty_target, scenes


def small(detector: str = "retinanet", **options: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "num_classes": 2,
        "backbone": "resnet18",
        "first_level": 3 if detector in ONE_STAGE else 2,
        "last_level": 6,
        "channels": 16,
        "blocks": 1,
        "min_size": 64,
        "max_size": 96,
        **options,
    }
    return ModelConfig(detector, **values)


def make(config: ModelConfig, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build(config)


@pytest.mark.parametrize(
    "config",
    [
        *(small(detector) for detector in DETECTORS),
        *(small(detector, blocks=0) for detector in DETECTORS if detector != "faster_rcnn_task"),
        small("faster_rcnn", keypoints=2),
        small("faster_rcnn_task", keypoints=2),
        small("faster_rcnn_task", attentions=("scale",)),
        small("retinanet", convs=1, first_level=4, last_level=5),
        small("fcos", last_level=7, backbone="swin_t", init="microsoft"),
        small("atss", backbone="efficientnet_lite0", convs=1, shared_tower=True, anchor_scale=4.0),
        small("atss", blocks=0, shared_tower=True, anchor_scale=2),
        small("faster_rcnn", anchor_scale=4.0),
    ],
    ids=lambda config: f"{config.detector}-{config.blocks}-{config.keypoints}",
)
def test_trains_and_predicts(config: ModelConfig) -> None:
    model = make(config).train()
    images, targets = scenes()
    losses = model(
        [*images, torch.rand(3, 80, 60)], [*targets, empty_target(config.keypoints or 2)]
    )
    assert all(loss.dim() == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []
    assert (model.backbone.dyhead is None) == (config.blocks == 0)
    with torch.no_grad():
        found = model.eval()(images)
    assert len(found) == 2
    for detections in found:
        count = len(detections["boxes"])
        assert detections["boxes"].shape == (count, 4)
        assert detections["scores"].shape == detections["labels"].shape == (count,)
        assert ((detections["labels"] >= 1) & (detections["labels"] <= 2)).all()
        assert ("keypoints" in detections) == bool(config.keypoints)
        if config.keypoints:
            assert count > 0
            assert detections["keypoints"].shape == (count, config.keypoints, 3)
    assert model([]) == []


def test_boxes_are_in_pixels_of_the_input() -> None:
    model = make(small("fcos", min_size=32, max_size=64)).eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 130, 200)])
    corners = found["boxes"].amax(0)
    assert 100 < corners[2] <= 200
    assert 65 < corners[3] <= 130


@pytest.mark.parametrize("detector", DETECTORS)
def test_same_seed_same_model(detector: str) -> None:
    first, again, other = (make(small(detector), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_empty_models_take_the_state_of_built_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("retinanet", weights="DEFAULT")
    downloads: list[dict[str, Tensor]] = []

    def download(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        downloads.append(resnet18().state_dict())
        return downloads[-1]

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    empty = build_empty(config)
    assert not downloads
    built: Any = build(config)
    assert torch.equal(built.backbone.body.conv1.weight, downloads[0]["conv1.weight"])
    empty.load_state_dict(built.state_dict())
    images, _ = scenes()
    with torch.no_grad():
        for a, b in zip(built.eval()(images), empty.eval()(images), strict=True):
            assert torch.equal(a["boxes"], b["boxes"])


def test_parts_follow_the_configuration() -> None:
    task = make(small("faster_rcnn_task", blocks=2, high_offset="aligned"))
    assert [b.attentions for b in task.backbone.dyhead.blocks] == [("scale", "spatial")] * 2
    assert task.backbone.dyhead.blocks[1].high_offset == "aligned"
    whole = make(small("faster_rcnn"))
    assert whole.backbone.dyhead.blocks[0].attentions == ATTENTIONS
    beyond = {d: make(small(d)).backbone.fpn.extra_blocks.extra for d in DETECTORS}
    assert beyond == {
        "atss": "conv",
        "retinanet": "conv_relu",
        "fcos": "conv_relu",
        "faster_rcnn": "pool",
        "faster_rcnn_task": "pool",
    }
    rcnn = make(small("faster_rcnn_task", attentions=("scale",)))
    assert not any(isinstance(m, DynamicReLU) for m in rcnn.roi_heads.modules())
    assert any(isinstance(m, DynamicReLU) for m in task.roi_heads.modules())
    towers = {
        (blocks, convs): len(
            make(small("retinanet", blocks=blocks, convs=convs)).head.regression_head.conv
        )
        for blocks, convs in ((0, None), (1, None), (0, 2), (1, 0))
    }
    # The released RetinaNet keeps its towers after the head; ATSS does not.
    assert towers == {(0, None): 4, (1, None): 4, (0, 2): 2, (1, 0): 0}
    for detector in ("atss", "fcos"):
        assert [small(detector, blocks=blocks).tower_convs for blocks in (0, 1)] == [4, 0]
    frozen = make(small(frozen_stages=2)).backbone
    trained = {name.split(".")[0] for name, p in frozen.body.named_parameters() if p.requires_grad}
    assert trained == {"layer3", "layer4"}


@pytest.mark.parametrize(
    ("detector", "published"), [("atss", 8), ("retinanet", 4), ("faster_rcnn", 8)]
)
def test_anchor_scale(detector: str, published: float) -> None:
    def sides(**options: Any) -> Tensor:
        model = make(small(detector, blocks=0, **options))
        anchors = {
            "atss": lambda: model.anchors,
            "retinanet": lambda: model.anchor_generator,
            "faster_rcnn": lambda: model.rpn.anchor_generator,
        }[detector]()
        levels = anchors.levels([torch.zeros(1, 16, 1, 1) for _ in model.backbone.strides])
        areas = [(x[:, 2:] - x[:, :2]).prod(1).sqrt().min() for x in levels]
        return torch.stack(areas) / torch.tensor(model.backbone.strides)

    usual = sides()
    # Corners of torchvision's anchors are whole pixels.
    torch.testing.assert_close(usual, torch.full_like(usual, published), rtol=0.05, atol=0)
    torch.testing.assert_close(sides(anchor_scale=published), usual)
    doubled = sides(anchor_scale=2.0 * published)
    torch.testing.assert_close(doubled, 2 * usual, rtol=0.05, atol=0)


def test_shared_tower_serves_classes_and_boxes() -> None:
    shared, own = (
        make(small("atss", blocks=0, convs=2, shared_tower=shared)) for shared in (True, False)
    )
    names = [name for name, _ in shared.head.named_parameters() if "tower" in name]
    assert len(names) == 2 * 3  # a convolution and a normalisation each
    assert all(name.startswith("tower.") for name in names)
    assert not any(name.startswith("tower.") for name in own.head.state_dict())
    features = [torch.rand(1, 16, 8, 8)] * 4
    before = shared.head(features)
    with torch.no_grad():
        shared.head.tower[1][1].bias += 1
    for old, new in zip(before, shared.head(features), strict=True):
        assert not torch.allclose(old[0], new[0])
    values = 2 * (9 * 16 * 16 + 2 * 16)
    assert count_parameters(own) - count_parameters(shared) == values


def test_configuration_round_trip() -> None:
    config = small("faster_rcnn", attentions=["task", "scale"], keypoints=3, high_offset="crop")
    assert config.attentions == ("task", "scale")
    values = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(values) == config
    assert ModelConfig.from_dict({"detector": "atss", "num_classes": 3}) == ModelConfig("atss", 3)
    one = small("atss", convs=2, shared_tower=True, anchor_scale=2.5, frozen_stages=1)
    assert ModelConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    with pytest.raises(ValueError, match=r"settings among .*'blocks'.*, got \['block'\]"):
        ModelConfig.from_dict({**values, "block": 1})
    with pytest.raises(ValueError, match=r"\['num_classes'\], which are missing"):
        ModelConfig.from_dict({"detector": "atss"})


def test_older_files_of_retinanet_have_no_towers_after_the_head() -> None:
    now = small("retinanet")
    assert (now.convs, ModelConfig.from_dict(now.to_dict()).convs) == (4, 4)
    later = ("frozen_stages", "anchor_scale", "shared_tower", "backbone_last_level", "without_task")
    older = {name: value for name, value in now.to_dict().items() if name not in later}
    without = ModelConfig.from_dict({**older, "convs": None})
    assert without == small("retinanet", convs=0)
    assert ModelConfig.from_dict(without.to_dict()) == without
    assert ModelConfig.from_dict({**older, "convs": None, "blocks": 0}).tower_convs == 4
    assert ModelConfig.from_dict({**older, "convs": None, "detector": "atss"}) == small("atss")
    # A model that such a file is of had the parameters of one without towers.
    build_empty(without).load_state_dict(make(small("retinanet", convs=0)).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detector": "yolo"}, "detector to be one of .*got 'yolo'"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": "10"}, "num_classes.*got '10'"),
        ({"backbone": None}, "backbone"),
        ({"channels": -16}, "channels"),
        ({"blocks": -1}, "blocks as an integer of at least 0, got -1"),
        ({"blocks": None}, "blocks"),
        ({"convs": -1}, "convs"),
        ({"convs": 1.5}, "convs"),
        ({"keypoints": -1}, "keypoints"),
        ({"keypoints": 17}, "one-stage detector retinanet, got 17; faster_rcnn and"),
        ({"first_level": 5, "last_level": 3}, "first_level <= last_level"),
        ({"first_level": 0}, "first_level"),
        ({"min_size": 100, "max_size": 96}, "min_size <= max_size, got 100 and 96"),
        ({"attentions": ("scale", "spacial")}, "attentions .*got 'spacial'"),
        ({"high_offset": "round"}, "high_offset"),
        ({"detector": "faster_rcnn", "convs": 4}, "no towers, got 4"),
        ({"frozen_stages": -1}, "frozen_stages as an integer of at least 0, got -1"),
        ({"frozen_stages": None}, "frozen_stages"),
        ({"anchor_scale": 0}, "anchor_scale as a positive number of strides.*got 0"),
        ({"anchor_scale": float("nan")}, "anchor_scale.*got nan"),
        ({"anchor_scale": "8"}, "anchor_scale.*got '8'"),
        ({"anchor_scale": True}, "anchor_scale.*got True"),
        ({"detector": "fcos", "anchor_scale": 8.0}, "None for fcos, which has no anchors, got 8"),
        ({"shared_tower": True, "convs": 4}, "False for retinanet, got True; only atss"),
        ({"detector": "faster_rcnn", "shared_tower": True}, "False for faster_rcnn"),
        ({"detector": "atss", "shared_tower": True}, "at least 1 for shared_tower, got None"),
        ({"detector": "atss", "shared_tower": "yes"}, "True or False, got 'yes'"),
        ({"detector": "faster_rcnn_task", "blocks": 0}, 'plain detector is "faster_rcnn"'),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**{"detector": "retinanet", **options})


def test_channels_that_cannot_be_grouped() -> None:
    with pytest.raises(ValueError, match="got 24 channels and 16 groups"):
        build(small(channels=24))
    make(small(channels=24, blocks=0))


def test_gflops_of_a_block() -> None:
    # Levels of a 64 x 96 image, P3 to P5; a block's products, two operations each.
    pixels, channels = [8 * 12, 4 * 6, 2 * 3], 16
    offsets = 27 * 9 * channels * sum(pixels)
    # Each level's own branch; the finer one's with stride 2; the coarser one's at its own size.
    branches = 9 * channels**2 * (sum(pixels) + 2 * sum(pixels[1:]))
    relu = len(pixels) * (channels * channels // 4 + channels // 4 * 4 * channels)
    gates = channels * (3 * len(pixels) - 2)  # of each branch
    costs = []
    for blocks in (1, 2, 3):
        model = make(small("fcos", last_level=5, blocks=blocks, convs=0)).train()
        costs.append(gflops(model, 64, 96))
        assert model.training
    expected = 2e-9 * (offsets + branches + relu + gates)
    assert costs[1] - costs[0] == pytest.approx(expected, rel=1e-6)
    assert costs[2] - costs[1] == pytest.approx(expected, rel=1e-6)


def test_gflops_and_parameters_of_predictors() -> None:
    sizes = {"last_level": 5, "blocks": 0}
    plain, towers = (make(small("retinanet", convs=convs, **sizes)) for convs in (0, 3))
    values = 2 * 3 * 9 * 16 * 16  # three convolutions in each of two towers
    assert count_parameters(towers) - count_parameters(plain) == values + 2 * 3 * 16
    expected = 2e-9 * values * (8 * 12 + 4 * 6 + 2 * 3)
    assert gflops(towers, 64, 96) - gflops(plain, 64, 96) == pytest.approx(expected, rel=1e-6)
    # Resized to 64 x 96 as well.
    assert gflops(plain, 128, 192) == pytest.approx(gflops(plain, 64, 96))

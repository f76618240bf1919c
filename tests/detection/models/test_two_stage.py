"""Faster R-CNN learns with every box head and with keypoints, and pools where it should."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from dyhead_cuda.detection.models.two_stage import FasterRCNN, _make_pooling
from dyhead_cuda.detection.names import BoxHead
from dyhead_cuda.modules import DynamicReLU
from tests.helpers.detection.small_scenes import (
    SmallPyramid,
    assert_found,
    empty_target,
    overfit,
    scenes,
)


def make(box_head: BoxHead = "mlp", keypoints: int = 0, classes: int = 2) -> Any:
    backbone = SmallPyramid(strides=(4, 8, 16))
    model: Any = FasterRCNN(
        backbone, classes, min_size=64, max_size=64, box_head=box_head, keypoints=keypoints
    )
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    model.rpn._pre_nms_top_n = {"training": 200, "testing": 200}
    return model


@pytest.mark.parametrize("box_head", ["mlp", "task", "linear"])
def test_learns_two_scenes(box_head: BoxHead) -> None:
    assert_found(overfit(lambda: make(box_head), steps=50, rate=0.005))


def test_learns_keypoints() -> None:
    best = assert_found(overfit(lambda: make("task", keypoints=2), steps=50, rate=0.01))
    for found, target in zip(best, scenes()[1], strict=True):
        assert found["keypoints"].shape == (2, 2, 3)
        error = (found["keypoints"] - target["keypoints"])[..., :2].norm(dim=-1)
        assert error.mean() < 3


def test_box_heads() -> None:
    torch.manual_seed(0)
    heads = {kind: make(kind).roi_heads for kind in ("mlp", "task", "linear")}
    relus = {
        kind: [m for m in head.box_head.modules() if isinstance(m, DynamicReLU)]
        for kind, head in heads.items()
    }
    assert {kind: len(found) for kind, found in relus.items()} == {"mlp": 0, "task": 1, "linear": 0}
    assert isinstance(heads["mlp"].box_head, TwoMLPHead)
    assert heads["mlp"].box_predictor.cls_score.in_features == 4 * 16
    regions = torch.randn(5, 16, 7, 7)
    for kind in ("task", "linear"):
        assert heads[kind].box_predictor.cls_score.in_features == 16 * 49
        assert heads[kind].box_predictor.cls_score.out_features == 3
        values = heads[kind].box_head(regions)
        expected = relus[kind][0](regions) if kind == "task" else regions
        torch.testing.assert_close(values.view(5, 16, 7, 7), expected)
        # Each region has coefficients of its own.
        torch.testing.assert_close(heads[kind].box_head(regions[2:3]), values[2:3])
        assert heads[kind].box_head(regions[:0]).shape == (0, 16 * 49)


@pytest.mark.parametrize("side", [33, 64])
def test_regions_are_pooled_at_their_place(side: int) -> None:
    # Images of 33 pixels are padded to 64: a stride guessed from 33 and 16 would be 2.
    pooling = _make_pooling((4, 8, 64), 7)
    assert pooling.featmap_names == ["0", "1"]
    levels = OrderedDict()
    for i, stride in enumerate((4, 8, 64)):
        size = 64 // stride
        x = torch.arange(float(size)) * stride
        levels[str(i)] = torch.stack((x.expand(size, size), x[:, None].expand(size, size)))[None]
    box = torch.tensor([[6.0, 5.0, 27.0, 19.0]])
    region = pooling(levels, [box], [(side, side)])[0]
    x = 6 + 21 / 7 * (torch.arange(7) + 0.5)
    y = 5 + 14 / 7 * (torch.arange(7) + 0.5)
    torch.testing.assert_close(region[0], x.expand(7, 7), atol=1e-4, rtol=0)
    torch.testing.assert_close(region[1], y[:, None].expand(7, 7), atol=1e-4, rtol=0)


def test_large_regions_come_from_coarse_levels() -> None:
    pooling = _make_pooling((4, 8, 16, 32), 7)
    levels = OrderedDict(
        (str(i), torch.full((1, 1, 800 // s, 800 // s), float(s)))
        for i, s in enumerate((4, 8, 16, 32))
    )
    boxes = torch.tensor([[300.0, 300, 300 + s, 300 + s] for s in (50, 112, 230, 460)])
    region = pooling(levels, [boxes], [(800, 800)])
    assert region.mean((1, 2, 3)).tolist() == [4, 8, 16, 32]


def test_needs_levels_to_pool_from() -> None:
    with pytest.raises(ValueError, match=r"stride 32 or less.*\(64, 128\)"):
        FasterRCNN(SmallPyramid(strides=(64, 128)), 2)


@pytest.mark.parametrize("keypoints", [0, 2])
def test_images_without_boxes(keypoints: int) -> None:
    torch.manual_seed(0)
    model = make("task", keypoints).train()
    images, targets = scenes()
    for chosen in ([empty_target(2), targets[1]], [empty_target(2), empty_target(2)]):
        losses = model(images, chosen)
        assert ("loss_keypoint" in losses) == bool(keypoints)
        assert all(loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        has_boxes = any(len(target["boxes"]) for target in chosen)
        assert (losses["loss_box_reg"] > 0) == has_boxes


def test_no_detections_have_no_keypoints() -> None:
    torch.manual_seed(0)
    model = make("task", keypoints=2).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([50.0, 0, 0]))
        found = model(scenes()[0])
    assert [detections["boxes"].shape for detections in found] == [(0, 4)] * 2
    assert [detections["keypoints"].shape for detections in found] == [(0, 2, 3)] * 2


def test_checks_come_first() -> None:
    model = make(keypoints=2).train()
    images, targets = scenes()
    model.backbone = nn.Identity()  # would fail
    without = {key: targets[1][key] for key in ("boxes", "labels")}
    with pytest.raises(ValueError, match=r"target 1, \['keypoints'\] missing"):
        model(images, [targets[0], without])
    assert model.eval()([]) == []


def test_boxes_are_not_rounded_under_autocast() -> None:
    torch.manual_seed(0)
    model = make("task", keypoints=2).train()
    images, targets = scenes()
    proposals: list[Tensor] = []
    model.roi_heads.register_forward_pre_hook(lambda _, inputs: proposals.extend(inputs[1]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        sum(losses.values()).backward()
        found = model.eval()(images)[0]
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    places = found["keypoints"][..., :2], found["keypoints_scores"]  # of the heatmaps' maxima
    for values in (proposals[0], found["boxes"], *places):
        assert values.dtype == torch.float32
        assert len(values) > 10
        assert (values != values.bfloat16().float()).float().mean() > 0.3

"""RetinaNet and FCOS learn, count labels from 1, and fit any strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda.detection.models.one_stage import FCOS, RetinaNet
from tests.helpers.detection.small_scenes import (
    SmallPyramid,
    assert_found,
    empty_target,
    overfit,
    scenes,
)

DETECTORS = [RetinaNet, FCOS]


def make(kind: Any, convs: int = 0, classes: int = 2, **pyramid: Any) -> Any:
    return kind(SmallPyramid(**pyramid), classes, min_size=64, max_size=64, convs=convs)


@pytest.mark.parametrize("convs", [0, 2])
@pytest.mark.parametrize("kind", DETECTORS)
def test_learns_two_scenes(kind: Any, convs: int) -> None:
    channels = 16 if convs else 32
    model = overfit(lambda: make(kind, convs, channels=channels), steps=80, rate=0.005)
    assert_found(model)


@pytest.mark.parametrize("kind", DETECTORS)
def test_labels_from_one_without_a_background_class(kind: Any) -> None:
    torch.manual_seed(0)
    model = make(kind, classes=3).eval()
    predictor = model.head.classification_head.cls_logits
    assert predictor.out_channels == 3 * (9 if kind is RetinaNet else 1)
    for label in (1, 2, 3):
        with torch.no_grad():
            predictor.bias.fill_(-9).view(-1, 3)[:, label - 1] = 4
            found = model(scenes()[0])
        assert [set(detections["labels"].tolist()) for detections in found] == [{label}] * 2


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("convs", [0, 1, 4])
def test_towers(kind: Any, convs: int) -> None:
    head = make(kind, convs).head
    for branch in (head.classification_head, head.regression_head):
        convolutions = [m for m in branch.conv.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == convs
        for convolution in convolutions:
            assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.2)
        norms = [m for m in branch.conv.modules() if isinstance(m, nn.GroupNorm)]
        assert len(norms) == (convs if kind is FCOS else 0)


def test_published_groups_of_the_towers() -> None:
    head = make(FCOS, 1, channels=256).head
    assert head.regression_head.conv[1].num_groups == 32


def test_towers_of_few_channels_on_one_pixel() -> None:
    # Group normalisation of single values is an error in training.
    images, targets = scenes()
    losses = make(FCOS, 1, strides=(32, 64)).train()(images[:1], targets[:1])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("kind", DETECTORS)
def test_images_without_boxes(kind: Any) -> None:
    torch.manual_seed(0)
    model = make(kind).train()
    images, targets = scenes()
    for chosen in ([empty_target(), targets[1]], [empty_target(), empty_target()]):
        losses = model(images, chosen)
        assert all(loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        assert model.backbone.stem.weight.grad.abs().sum() > 0
        has_boxes = any(len(target["boxes"]) for target in chosen)
        assert (losses["bbox_regression"] > 0) == has_boxes


@pytest.mark.parametrize("kind", DETECTORS)
def test_checks_come_first(kind: Any) -> None:
    model = make(kind).train()
    images, targets = scenes()
    model.backbone = nn.Identity()  # would fail
    with pytest.raises(ValueError, match="in target 1"):
        model(images, [targets[0], {**targets[1], "labels": torch.tensor([1, 3])}])
    with pytest.raises(ValueError, match="a target for each"):
        model(images)
    assert model.eval()([]) == []
    with pytest.raises(ValueError, match="for image 0"):
        model([torch.zeros(1, 64, 64)])


def test_boxes_are_not_rounded_under_autocast() -> None:
    torch.manual_seed(0)
    model = make(FCOS).train()
    images, targets = scenes()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        sum(losses.values()).backward()
        found = model.eval()(images)[0]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    boxes = found["boxes"]
    assert boxes.dtype == found["scores"].dtype == torch.float32
    assert len(boxes) > 20
    assert (boxes != boxes.bfloat16().float()).float().mean() > 0.3


@pytest.mark.parametrize(
    ("strides", "side", "level"),
    [
        ((4, 8, 16), 20, 0),  # from a point near its middle, at most 8 * 4 to any side
        ((4, 8, 16), 70, 1),  # 4 * 8 to 8 * 8
        ((8, 16), 56, 0),
        ((16, 32), 56, 0),
        ((2, 4, 8), 70, 2),
        ((16,), 56, 0),
        ((32, 64), 60, 0),
    ],
)
def test_fcos_gives_objects_to_levels_by_their_stride(
    strides: tuple[int, ...], side: int, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make(FCOS, strides=strides).train()
    matched: list[Tensor] = []

    def record(
        targets: Any, outputs: Any, anchors: Any, matches: list[Tensor]
    ) -> dict[str, Tensor]:
        matched.extend(matches)
        return {}

    monkeypatch.setattr(model.head, "compute_loss", record)
    low, high = 32 - side / 2 - 1, 32 + side / 2 - 1
    target = {"boxes": torch.tensor([[low, low, high, high]]), "labels": torch.tensor([1])}
    model([torch.rand(3, 64, 64)], [target])
    sizes = [max(1, 64 // stride) ** 2 for stride in strides]
    hits = [int((part >= 0).sum()) for part in matched[0].split(sizes)]
    assert [i for i, count in enumerate(hits) if count] == [level]


def test_boxes_without_area_take_no_places() -> None:
    torch.manual_seed(0)
    model = make(FCOS, classes=3).eval()
    model.score_thresh, model.detections_per_img = 0.0, 20
    regression = model.head.regression_head.bbox_reg
    with torch.no_grad():
        model.head.classification_head.cls_logits.bias.fill_(2)
        regression.bias.fill_(-0.01)  # about half of the distances become 0
        regression.weight.normal_(0, 1)
        (found,) = model(scenes()[0][:1])
    assert model.detections_per_img == 20
    assert len(found["boxes"]) == 20
    assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()

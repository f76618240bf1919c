"""The ATSS detector: anchors, losses against plain loops, detections, and that it learns."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from dyhead_cuda.detection.models.atss import ATSS, Predictions
from tests.helpers.detection.slow_assigner import slow_assign


class TinyPyramid(nn.Module):
    """Levels of stride 8, 16 and 32."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.out_channels, self.strides, self.num_levels = channels, (8, 16, 32), 3
        self.stem = nn.Conv2d(3, channels, 8, stride=8)
        self.down = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(3))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        x = self.norms[0](self.stem(images))
        levels = [x]
        for conv, norm in zip(self.down, list(self.norms)[1:], strict=True):
            x = norm(conv(x.relu()))
            levels.append(x)
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


def detector(**options: Any) -> ATSS:
    options = {"min_size": 96, "max_size": 128} | options
    return ATSS(TinyPyramid(), 3, **options)


BOXES = torch.tensor([[8.0, 10.0, 40.0, 44.0], [44.0, 30.0, 90.0, 88.0]])
LABELS = torch.tensor([1, 3])


def scene() -> tuple[Tensor, dict[str, Tensor]]:
    """Two coloured boxes on noise."""
    image = torch.rand(3, 96, 96) * 0.2
    for channel, (x1, y1, x2, y2) in zip((0, 2), BOXES.int().tolist(), strict=True):
        image[channel, y1:y2, x1:x2] = 0.9
    return image, {"boxes": BOXES.clone(), "labels": LABELS.clone()}


def empty_target() -> dict[str, Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_anchors(offset: float) -> None:
    model = detector(center_offset=offset)
    # 5 / 3 positions on a level: the strides must not be derived from these sizes.
    features = [torch.zeros(1, 16, 5, 7), torch.zeros(1, 16, 3, 4), torch.zeros(1, 16, 2, 2)]
    for level, feature, stride in zip(
        model.anchors.levels(features), features, (8, 16, 32), strict=True
    ):
        height, width = feature.shape[-2:]
        assert level.shape == (height * width, 4)
        y, x = height - 1, 1
        center = torch.tensor([x + offset, y + offset]) * stride
        expected = torch.cat((center - 4 * stride, center + 4 * stride))
        assert torch.equal(level[y * width + x], expected)


def test_decoding_undoes_encoding() -> None:
    model = detector()
    anchors = torch.cat(model.anchors.levels([torch.zeros(1, 16, 6, 6)] * 3))[: len(BOXES)]
    deltas = model.box_coder.encode_single(BOXES, anchors)
    torch.testing.assert_close(model.box_coder.decode_single(deltas, anchors), BOXES)
    # (x - xa) / wa / 0.1 and log(w / wa) / 0.2
    anchor = anchors[0]
    x = (BOXES[0, 0] + BOXES[0, 2] - anchor[0] - anchor[2]) / 2 / (anchor[2] - anchor[0]) / 0.1
    w = torch.log((BOXES[0, 2] - BOXES[0, 0]) / (anchor[2] - anchor[0])) / 0.2
    torch.testing.assert_close(deltas[0, [0, 2]], torch.stack((x, w)))


def random_predictions(anchors: list[Tensor], images: int, num_classes: int) -> Predictions:
    return Predictions(
        [torch.randn(images, len(a), num_classes) for a in anchors],
        [torch.randn(images, len(a), 4) * 0.5 for a in anchors],
        [torch.randn(images, len(a)) for a in anchors],
    )


def plain_losses(
    predictions: Predictions, anchors: Tensor, owners: list[list[int]], targets: Any
) -> dict[str, float]:
    """The published sums, one anchor at a time, in Python floats."""
    logits, deltas, centerness = (torch.cat(p, 1).double().tolist() for p in predictions)
    focal = boxes = ctrness = weight = 0.0
    count = 0
    for n, owner in enumerate(owners):
        count += max(1, sum(o >= 0 for o in owner))
        for a, o in enumerate(owner):
            for c, z in enumerate(logits[n][a]):
                p = 1 / (1 + math.exp(-z))
                if o >= 0 and int(targets[n]["labels"][o]) == c + 1:
                    focal -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    focal -= 0.75 * p**2 * math.log(1 - p)
            if o < 0:
                continue
            x1, y1, x2, y2 = anchors[a].tolist()
            u1, v1, u2, v2 = targets[n]["boxes"][o].tolist()
            cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            left, right, top, bottom = cx - u1, u2 - cx, cy - v1, v2 - cy
            target = math.sqrt(
                min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
            )
            dx, dy, dw, dh = deltas[n][a]
            cx, cy = cx + 0.1 * dx * w, cy + 0.1 * dy * h
            w, h = w * math.exp(0.2 * dw), h * math.exp(0.2 * dh)
            p1, q1, p2, q2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
            inter = max(0, min(p2, u2) - max(p1, u1)) * max(0, min(q2, v2) - max(q1, v1))
            union = w * h + (u2 - u1) * (v2 - v1) - inter
            hull = (max(p2, u2) - min(p1, u1)) * (max(q2, v2) - min(q1, v1))
            boxes += target * (1 - inter / union + (hull - union) / hull)
            z = centerness[n][a]
            ctrness += math.log(1 + math.exp(z)) - target * z
            weight += target
    return {
        "classification": focal / count,
        "bbox_regression": 2 * boxes / max(1, weight),
        "bbox_ctrness": ctrness / count,
    }


@pytest.mark.parametrize("empty", ["none", "one", "all"])
def test_losses_are_the_published_sums(empty: str) -> None:
    model = detector()
    anchors = model.anchors.levels([torch.zeros(1, 16, 12 // 2**i, 12 // 2**i) for i in range(3)])
    predictions = random_predictions(anchors, 2, 3)
    boxes = BOXES + torch.tensor([0.3, 0.9, 1.1, 0.2])  # no two centres equally near
    full = {"boxes": boxes, "labels": LABELS}
    targets = {
        "none": [full, {"boxes": boxes[:1] + 3.1, "labels": torch.tensor([2])}],
        "one": [empty_target(), full],
        "all": [empty_target(), empty_target()],
    }[empty]
    owners = [slow_assign(anchors, target["boxes"], 9) for target in targets]
    assert any(o >= 0 for owner in owners for o in owner) is (empty != "all")
    got = model._losses(predictions, anchors, targets)
    expected = plain_losses(predictions, torch.cat(anchors), owners, targets)
    assert {name: float(loss) for name, loss in got.items()} == pytest.approx(expected, rel=1e-5)


def test_averages_run_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank with three times as many positives: half of the loss, as (1 + 3) / 2 = 2."""
    model = detector()
    image, target = scene()
    alone = model([image], [target])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value.mul_(4))
    for name, loss in model([image], [target]).items():
        torch.testing.assert_close(loss, alone[name] / 2)


@pytest.mark.parametrize("convs", [0, 2])
@pytest.mark.parametrize("objects", [True, False])
def test_gradients_reach_every_parameter(convs: int, objects: bool) -> None:
    model = detector(convs=convs)
    image, target = scene()
    losses = model([image], [target if objects else empty_target()])
    assert {name: loss.ndim for name, loss in losses.items()} == {
        "classification": 0,
        "bbox_regression": 0,
        "bbox_ctrness": 0,
    }
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DDP waits for all of them
        assert parameter.grad.isfinite().all(), name
        if objects and name != "head.scales":
            assert parameter.grad.abs().max() > 0, name


def test_predictors_start_at_the_prior() -> None:
    model = detector(convs=1)
    features = [torch.randn(1, 16, 4, 4)] * 3
    predictions = model.head(features)
    assert float(predictions.logits[0].sigmoid().mean().detach()) == pytest.approx(0.01, rel=0.2)
    assert model.head.classes.kernel_size == (3, 3)
    assert detector().head.classes.kernel_size == (3, 3)
    assert detector(kernel_size=1).head.classes.kernel_size == (1, 1)


def test_each_level_has_its_scale() -> None:
    model = detector()
    features = [torch.randn(1, 16, 4, 4)] * 3
    with torch.no_grad():
        model.head.scales.copy_(torch.tensor([1.0, 2.0, 3.0]))
        first, second, third = model.head(features).deltas
    torch.testing.assert_close(second, 2 * first)
    torch.testing.assert_close(third, 3 * first)


def test_learns_one_scene() -> None:
    model = detector(detections=10)
    image, target = scene()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        (found,) = model([image])
    assert (found["scores"].diff() <= 0).all()
    overlaps = box_iou(found["boxes"], BOXES)
    for index, label in enumerate(LABELS):
        mine = found["labels"] == label
        assert mine.any()
        best = int(torch.where(mine, found["scores"], -1).argmax())
        assert overlaps[best, index] > 0.7
    assert set(found["labels"].tolist()) <= {1, 2, 3}


class Fixed(nn.Module):
    """A head that says what it is told."""

    def __init__(self, predictions: Predictions) -> None:
        super().__init__()
        self.predictions = predictions

    def forward(self, features: list[Tensor]) -> Predictions:
        return self.predictions


def told(size: int, says: list[tuple[int, int, float, float, list[float]]], **options: Any) -> Any:
    """Detections of a square image where the finest level says (anchor, class, p, centerness, box)

    and all other anchors nothing.
    """
    model = detector(min_size=size, max_size=size, **options).eval()
    anchors = model.anchors.levels([torch.zeros(1, 16, size // s, size // s) for s in (8, 16, 32)])
    predictions = Predictions(
        [torch.full((1, len(a), 3), -9.0) for a in anchors],
        [torch.zeros(1, len(a), 4) for a in anchors],
        [torch.zeros(1, len(a)) for a in anchors],
    )
    for anchor, kind, probability, centerness, box in says:
        predictions.logits[0][0, anchor, kind] = math.log(probability / (1 - probability))
        predictions.centerness[0][0, anchor] = math.log(centerness / (1 - centerness))
        predictions.deltas[0][0, anchor] = model.box_coder.encode_single(
            torch.tensor([box]), anchors[0][anchor][None]
        )[0]
    model.add_module("head", Fixed(predictions))
    (found,) = model([torch.rand(3, size, size)])
    return found


A, B = [10.0, 10.0, 50.0, 50.0], [12.0, 10.0, 52.0, 50.0]


def test_scores_and_labels() -> None:
    found = told(64, [(0, 1, 0.8, 0.5, A), (3, 2, 0.6, 0.9, [30.0, 2.0, 40.0, 20.0])])
    assert found["labels"].tolist() == [3, 2]
    assert found["scores"].tolist() == pytest.approx([0.54, 0.4])
    torch.testing.assert_close(found["boxes"][1], torch.tensor(A))


def test_threshold_is_on_the_class_probability() -> None:
    found = told(64, [(0, 1, 0.06, 0.1, A), (3, 2, 0.04, 0.99, A)])
    assert found["labels"].tolist() == [2]
    assert found["scores"].tolist() == pytest.approx([0.006])


def test_suppression_is_per_class() -> None:
    same = told(64, [(0, 1, 0.8, 0.9, A), (1, 1, 0.7, 0.9, B)])
    assert same["scores"].tolist() == pytest.approx([0.72])
    other = told(64, [(0, 1, 0.8, 0.9, A), (1, 0, 0.7, 0.9, B)])
    assert other["labels"].tolist() == [2, 1]


def test_suppression_needs_a_greater_overlap() -> None:
    apart = [22.0, 10.0, 62.0, 50.0]  # IoU 28 / 52
    assert len(told(64, [(0, 1, 0.8, 0.9, A), (1, 1, 0.7, 0.9, apart)])["boxes"]) == 2
    strict = told(64, [(0, 1, 0.8, 0.9, A), (1, 1, 0.7, 0.9, apart)], nms_threshold=0.5)
    assert len(strict["boxes"]) == 1


def test_candidates_of_a_level() -> None:
    """mmdet keeps the most probable, microsoft/DynamicHead the best scores."""
    far = [5.0, 52.0, 15.0, 62.0]
    says = [(0, 1, 0.8, 0.1, A), (1, 2, 0.7, 0.9, far)]
    assert told(64, says, candidates=1)["labels"].tolist() == [2]
    assert told(64, says, candidates=1, postprocess="microsoft")["labels"].tolist() == [3]
    assert told(64, says, detections=1)["labels"].tolist() == [3]


def test_clipping_before_or_after_suppression() -> None:
    """Two boxes that only differ outside the image are one in mmdet, two in microsoft's code."""
    a, b, outside = [40.0, 40.0, 64.0, 64.0], [40.0, 40.0, 110.0, 110.0], [70.0, 70.0, 99.0, 99.0]
    says = [(0, 1, 0.8, 0.9, a), (1, 1, 0.7, 0.9, b), (2, 1, 0.6, 0.9, outside)]
    assert told(64, says)["boxes"].tolist() == [pytest.approx(a, abs=1e-3)]
    late = told(64, says, postprocess="microsoft")["boxes"]
    assert late.tolist() == [pytest.approx(a, abs=1e-3)] * 2


def test_boxes_are_in_the_pixels_of_the_input() -> None:
    model = detector(min_size=64, max_size=64, score_threshold=0.0, detections=20).eval()
    with torch.no_grad():
        found = model([torch.rand(3, 128, 96), torch.rand(3, 32, 32)])
    for each, (width, height) in zip(found, ((96, 128), (32, 32)), strict=True):
        assert len(each["boxes"]) == 20
        limit = torch.tensor([width, height, width, height]) + 1e-3
        assert (each["boxes"] >= 0).all()
        assert (each["boxes"] <= limit).all()
        assert (each["boxes"].amax(0)[2:] > 0.8 * limit[2:]).all()


def test_nothing_found() -> None:
    model = detector(score_threshold=0.9).eval()
    assert model([]) == []
    found = model([torch.rand(3, 96, 96), torch.rand(3, 64, 96)])
    for each in found:
        assert each["boxes"].shape == (0, 4)
        assert each["scores"].shape == each["labels"].shape == (0,)
        assert each["labels"].dtype == torch.int64


def test_autocast_keeps_the_losses_in_float32() -> None:
    model = detector()
    image, target = scene()
    expected = model([image], [target])
    with torch.autocast("cpu", torch.bfloat16):
        got = model([image], [target])
    for name, loss in got.items():
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(expected[name].detach()), rel=0.05)


GOOD = {"boxes": BOXES, "labels": LABELS}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "expected a target for each of 1 images, got none"),
        ([GOOD, GOOD], "each of 1 images, got 2"),
        ([{"boxes": BOXES}], r"\['labels'\] missing"),
        ([GOOD | {"boxes": BOXES[0]}], r"boxes \[n, 4\] in target 0, got torch.float32 \[4\]"),
        ([GOOD | {"boxes": BOXES.long()}], "floating-point boxes"),
        ([GOOD | {"labels": LABELS[:1]}], r"int64 labels \[2\] in target 0"),
        ([GOOD | {"labels": LABELS.float()}], "int64 labels"),
        ([GOOD | {"labels": torch.tensor([1, 4])}], r"labels in 1..3 \(0 is background\), got 4"),
        ([GOOD | {"labels": torch.tensor([0, 1])}], "got 0 in target 0"),
        ([GOOD | {"boxes": BOXES.flip(1)}], "x1 < x2"),
        ([GOOD | {"boxes": BOXES * math.nan}], "finite boxes"),
    ],
)
def test_bad_targets(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detector()([torch.rand(3, 96, 96)], targets)


def test_bad_images_and_options() -> None:
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        detector().eval()([torch.rand(1, 96, 96)])
    with pytest.raises(ValueError, match="floating-point"):
        detector().eval()([torch.zeros(3, 96, 96, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="at least one image"):
        detector()([], [])
    with pytest.raises(ValueError, match="postprocess"):
        detector(postprocess="glip")
    with pytest.raises(ValueError, match="num_classes"):
        ATSS(TinyPyramid(), 0)

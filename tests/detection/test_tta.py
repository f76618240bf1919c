"""Several views of an image at test time."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda.detection import DigitScenes, ModelConfig, TestTimeAugmentation, build, evaluate
from dyhead_cuda.detection.prediction import predict

WIDTH = 64


class Finder(nn.Module):
    """Finds bright pixels as boxes of 8 x 8 pixels that begin there: exactly, not symmetrically."""

    num_keypoints = 0

    def __init__(self) -> None:
        super().__init__()
        self.transform = SimpleNamespace(min_size=(WIDTH,), max_size=WIDTH)
        self.sizes: list[tuple[int, int]] = []

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        self.sizes.append((self.transform.min_size[-1], self.transform.max_size))
        found = []
        for image in images:
            y, x = (image[0] > 0.5).nonzero().unbind(1)
            corner = torch.stack((x, y), 1).double()
            scores = image[0, y, x].double()
            labels = torch.where(y % 2 == 0, 1, 2)
            found.append(
                {"boxes": torch.cat((corner, corner + 8), 1), "scores": scores, "labels": labels}
            )
        return found


def dots() -> Tensor:
    image = torch.zeros(3, 48, WIDTH)
    for x, y, value in ((4, 6, 0.9), (30, 11, 0.8), (50, 20, 0.7), (31, 33, 0.6)):
        image[:, y, x] = value
    return image


def ordered(found: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    rows = zip(
        found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True
    )
    return sorted((score, label, *box) for score, label, box in rows)


def small(name: str = "faster_rcnn", **options: Any) -> Any:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "channels": 16,
        "blocks": 1,
        "last_level": 5,
        "min_size": 64,
        "max_size": 64,
    }
    return build(ModelConfig(name, 10, "timm/test_resnet.r160_in1k", **sizes, **options)).eval()


def test_a_mirrored_image_has_mirrored_boxes_exactly() -> None:
    views = TestTimeAugmentation(Finder(), flip=True, nms_threshold=1.0).eval()
    image = dots()
    (found,), (mirrored,) = views([image]), views([image.flip(-1)])
    assert len(found["boxes"]) == 8  # each dot is seen in both views, at two places
    x1, y1, x2, y2 = mirrored["boxes"].unbind(1)
    back = {**mirrored, "boxes": torch.stack((WIDTH - x2, y1, WIDTH - x1, y2), 1)}
    assert ordered(back) == ordered(found)


@torch.no_grad()
def test_a_mirrored_image_has_mirrored_boxes() -> None:
    views = TestTimeAugmentation(small(), (1.0, 1.5), flip=True).eval()
    image = torch.rand(3, 48, WIDTH)
    (found,), (mirrored,) = views([image]), views([image.flip(-1)])
    assert len(found["boxes"]) > 5
    # By the scores: rounding may change the order of equal ones.
    torch.testing.assert_close(mirrored["scores"], found["scores"], atol=1e-5, rtol=0)
    first, second = found["boxes"][:3], mirrored["boxes"][:3]
    torch.testing.assert_close(WIDTH - second[:, [2, 0]], first[:, [0, 2]], atol=1e-2, rtol=0)


@torch.no_grad()
def test_one_plain_view_is_the_detector_s_own() -> None:
    model = small()
    images = [torch.rand(3, 48, 64), torch.rand(3, 64, 40)]
    for found, expected in zip(
        TestTimeAugmentation(model).eval()(images), model(images), strict=True
    ):
        assert len(expected["boxes"])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_plain_view_is_not_merged() -> None:
    image = dots()
    image[:, 6, 5] = 0.85  # beside another of its class
    (found,) = TestTimeAugmentation(Finder()).eval()([image])
    assert len(found["boxes"]) == 5


def test_scales_are_of_the_model_s_size_and_undone() -> None:
    finder = Finder()
    views = TestTimeAugmentation(finder, (0.5, 1.0, 1.25), flip=True).eval()
    views([dots(), dots()])
    assert finder.sizes == [(32, 32)] * 2 + [(64, 64)] * 2 + [(80, 80)] * 2
    assert (finder.transform.min_size, finder.transform.max_size) == ((WIDTH,), WIDTH)


@torch.no_grad()
def test_a_view_of_another_scale_is_a_detector_of_that_size() -> None:
    image = torch.rand(3, 48, WIDTH)
    model, larger = small(), small()
    larger.transform.min_size, larger.transform.max_size = (96,), 96
    (found,), (expected,) = (
        TestTimeAugmentation(model, (1.5,), nms_threshold=1.0).eval()([image]),
        larger([image]),
    )
    torch.testing.assert_close(found["scores"], expected["scores"])
    assert len(found["boxes"]) > 5


def test_views_are_merged_by_class_and_score() -> None:
    class TwoViews(Finder):
        def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
            larger = self.transform.min_size[-1] > WIDTH
            boxes = (
                [[1.0, 1, 11, 11], [30, 30, 40, 40]]
                if larger
                else [[0.0, 0, 10, 10], [0, 0, 10, 10]]
            )
            scores = [0.9, 0.3] if larger else [0.8, 0.5]
            labels = [1, 1] if larger else [1, 2]
            return [
                {
                    "boxes": torch.tensor(boxes),
                    "scores": torch.tensor(scores),
                    "labels": torch.tensor(labels),
                }
            ]

    (found,) = TestTimeAugmentation(TwoViews(), (1.0, 2.0), nms_threshold=0.5).eval()([dots()])
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert found["labels"].tolist() == [1, 2, 1]
    assert found["boxes"][0].tolist() == [1, 1, 11, 11]
    (one,) = TestTimeAugmentation(TwoViews(), (1.0, 2.0), detections=1).eval()([dots()])
    assert one["scores"].tolist() == pytest.approx([0.9])


def test_evaluation_prediction_and_keypoints() -> None:
    scenes = DigitScenes("val", num_images=2, size=(64, 64))
    model = small()
    plain, same, several = (
        evaluate(each, scenes, device="cpu", batch_size=2)
        for each in (
            model,
            TestTimeAugmentation(model),
            TestTimeAugmentation(model, (1.0, 1.25), flip=True),
        )
    )
    assert same.detections == plain.detections
    assert several.detections != plain.detections
    found = predict(TestTimeAugmentation(model, (1.25,)).eval(), scenes[0][0], 0.0)
    assert len(found["boxes"]) > 0
    points: Any = TestTimeAugmentation(small(keypoints=4), (1.0, 1.25)).eval()
    with torch.no_grad():
        (with_points,) = points([scenes[0][0]])
    assert with_points["keypoints"].shape == (len(with_points["boxes"]), 4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "one or more positive scales"),
        ({"scales": (1.0, -1.0)}, "one or more positive scales"),
        ({"nms_threshold": 1.5}, "nms_threshold from 0 to 1"),
        ({"detections": 0}, "detections"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TestTimeAugmentation(Finder(), **options)


def test_what_it_is_not_for() -> None:
    finder = Finder()
    finder.num_keypoints = 4
    with pytest.raises(ValueError, match="got one of 4; turn flipping off"):
        TestTimeAugmentation(finder, flip=True)
    with pytest.raises(RuntimeError, match="expected evaluation mode"):
        TestTimeAugmentation(Finder()).train()([dots()])

"""Sizes of training images that are drawn: large-scale jitter and several scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda.detection import DataConfig, DigitScenes, ModelConfig, ScaleJitter, build
from dyhead_cuda.detection.data import Target, draw_sizes


class Rectangles:
    """One image [3, 60, 90]: black, but for a white rectangle and a white square."""

    num_keypoints = 0
    classes, category_ids = ("wide", "square"), (1, 2)
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": []}  # noqa: RUF012

    def __init__(self, boxes: list[list[float]] | None = None) -> None:
        self.boxes = [[4, 6, 44, 26], [60, 30, 84, 54]] if boxes is None else boxes

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, boxes = torch.zeros(3, 60, 90), torch.tensor(self.boxes).view(-1, 4).float()
        for x1, y1, x2, y2 in boxes.int().tolist():
            image[:, y1:y2, x1:x2] = 1
        return image, {
            "boxes": boxes,
            "labels": torch.arange(1, len(boxes) + 1),
            "image_id": torch.tensor(7),
            "area": (boxes[:, 2:] - boxes[:, :2]).prod(1) / 2,
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        }


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.7])
def test_boxes_follow_their_objects(scale: float) -> None:
    dataset = ScaleJitter(Rectangles(), 100, (scale, scale))
    seen: dict[int, set[tuple[float, ...]]] = {1: set(), 2: set()}
    for _ in range(30):
        image, target = dataset[0]
        assert image.shape == (3, 100, 100)
        assert type(image) is type(target["boxes"]) is Tensor
        assert set(target) == {"boxes", "labels", "image_id", "area", "iscrowd"}
        assert int(target["image_id"]) == 7
        white = image[0] > 0.75
        inside = torch.zeros(100, 100, dtype=torch.bool)
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            x1, y1, x2, y2 = box.round().int().tolist()
            assert 0 <= x1 < x2 <= 100
            assert 0 <= y1 < y2 <= 100
            if min(x2 - x1, y2 - y1) > 8:  # not its rim, which is mixed with what is around it
                assert white[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].all()
            inside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = True
            seen[int(label)].add(tuple(box.tolist()))
        few = (white & ~inside).sum()  # of an object of which less than a pixel is left
        assert few <= 100
    assert all(len(places) > 5 for places in seen.values())  # at many places
    if scale <= 1:
        width = scale * 100 / 90 * 40
        assert all(abs(x2 - x1 - width) < 1 for x1, _, x2, _ in seen[1])
        assert (image == 0.5).any()  # what is beside the image is grey


def test_scales_are_drawn_from_their_range() -> None:
    dataset = ScaleJitter(Rectangles([[10, 10, 40, 40]]), 90, (0.2, 0.8))
    widths = []
    for _ in range(60):
        x1, _, x2, _ = dataset[0][1]["boxes"][0].tolist()
        widths.append((x2 - x1) / 30)
    assert 0.18 < min(widths) < 0.32
    assert 0.68 < max(widths) < 0.82


def test_areas_are_of_what_is_left() -> None:
    dataset = ScaleJitter(Rectangles([[0, 0, 90, 60]]), 90, (2, 2))  # cut to half in each direction
    _, target = dataset[0]
    x1, y1, x2, y2 = target["boxes"][0].tolist()
    assert (x2 - x1, y2 - y1) == (90, 90)
    torch.testing.assert_close(target["area"], torch.tensor([90.0 * 90 / 2]))


def test_objects_of_almost_no_size_are_dropped() -> None:
    dataset = ScaleJitter(Rectangles([[10, 10, 12, 30], [40, 10, 80, 50]]), 90, (0.3, 0.3))
    _, target = dataset[0]
    assert target["labels"].tolist() == [2]
    assert len(target["boxes"]) == len(target["area"]) == len(target["iscrowd"]) == 1


def test_no_objects_and_narrow_images() -> None:
    _, target = ScaleJitter(Rectangles([]), 64)[0]
    assert target["boxes"].shape == (0, 4)

    class Narrow(Rectangles):
        def __getitem__(self, index: int) -> tuple[Tensor, Target]:
            image, target = super().__getitem__(index)
            return image[:, :1], target

    assert ScaleJitter(Narrow([]), 32, (0.1, 0.1))[0][0].shape == (3, 32, 32)


def test_what_cannot_be_jittered() -> None:
    with pytest.raises(
        ValueError, match=r"without keypoints, got one with 4: .*turn scale jitter off"
    ):
        ScaleJitter(DigitScenes("train", 1, size=(64, 64), keypoints=True), 64)
    with pytest.raises(ValueError, match="scales as two positive numbers in order"):
        ScaleJitter(Rectangles(), 64, (2, 1))
    with pytest.raises(ValueError, match="size"):
        ScaleJitter(Rectangles(), 0)


def test_settings() -> None:
    data = DataConfig("digits", train={"num_images": 1}, scale_jitter=(0.5, 2), jitter_size=48)
    assert DataConfig.from_dict(data.to_dict()) == data
    opened = data.open("train")
    assert isinstance(opened, ScaleJitter)
    assert (opened.size, opened.scales) == (48, (0.5, 2))
    assert not isinstance(data.open("val"), ScaleJitter)
    assert DataConfig.from_dict({"spec": "digits"}) == DataConfig("digits")  # an old run's
    several = DataConfig("digits", multi_scale=(48, 96))
    assert DataConfig.from_dict(several.to_dict()) == several


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_jitter": (0.1, 2)}, "both scale_jitter and jitter_size"),
        ({"jitter_size": 64}, "both scale_jitter and jitter_size"),
        ({"scale_jitter": (0, 2), "jitter_size": 64}, "scale_jitter as two positive numbers"),
        ({"multi_scale": (96, 48)}, "multi_scale as two positive numbers in order"),
        ({"multi_scale": (48, 64.5)}, "multi_scale in whole pixels"),
        ({"multi_scale": "48"}, "multi_scale as two positive numbers"),
        (
            {"multi_scale": (48, 96), "scale_jitter": (0.1, 2), "jitter_size": 64},
            "scale_jitter or multi_scale, got both",
        ),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig("digits", **options)


def test_several_scales() -> None:
    small: dict[str, Any] = {"channels": 16, "blocks": 0, "last_level": 5, "min_size": 64}
    config = ModelConfig("atss", 3, "timm/test_resnet.r160_in1k", **small, max_size=128)
    model: Any = build(config)
    draw_sizes(model, (32, 96))
    image, target = torch.rand(3, 50, 70), {"boxes": torch.tensor([[10.0, 10, 30, 30]])}
    shorter = [model.transform.resize(image, dict(target))[0].shape[1] for _ in range(200)]
    assert set(shorter) <= set(range(32, 97))
    assert min(shorter) < 36
    assert max(shorter) >= 90
    assert len(set(shorter)) > 40
    model.eval()
    assert model.transform.resize(image, None)[0].shape[1] == 64
    with pytest.raises(ValueError, match=r"min_size of the model between .* 32 and 48, got 64"):
        draw_sizes(model, (32, 48))

"""The composed digits: deterministic, without leaks, with tight boxes and readable ink."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from dyhead_cuda.detection.data import DigitScenes, open_dataset, scenes
from dyhead_cuda.detection.data.digits import _scans

SMALL: dict[str, Any] = {"num_images": 12, "size": (64, 96), "heights": (10, 40)}


def pixels(dataset: DigitScenes, order: list[int]) -> dict[int, NDArray[np.uint8]]:
    return {index: dataset.scene(index).image for index in order}


@pytest.mark.parametrize("cache", [False, True])
def test_a_scene_depends_on_its_index_alone(cache: bool) -> None:
    forward = DigitScenes("train", **SMALL, cache=cache)
    backward = DigitScenes("train", **{**SMALL, "num_images": 40})
    there = pixels(forward, list(range(12)))
    back = pixels(backward, list(range(11, -1, -1)))
    for index in range(12):
        np.testing.assert_array_equal(there[index], back[index])
        again, target = forward[index]
        other, other_target = backward[index]
        assert torch.equal(again, other)
        assert all(torch.equal(target[key], other_target[key]) for key in target)
    assert len({image.tobytes() for image in there.values()}) == 12


def test_scenes_are_the_same_everywhere() -> None:
    """Results on the digits compare across machines and versions only as long as this passes."""
    scene = DigitScenes("val").scene(7)
    assert scene.labels.tolist() == [2, 5, 4, 6, 6, 4]
    expected = [
        [70, 9, 85, 29],
        [17, 63, 46, 118],
        [70, 65, 99, 122],
        [46, 23, 77, 84],
        [110, 99, 126, 116],
        [22, 19, 49, 59],
    ]
    assert scene.boxes.tolist() == expected
    np.testing.assert_allclose(scene.image.mean((0, 1)), (55.2492, 185.5217, 68.3233), atol=0.02)


def test_split_and_seed_change_the_scene() -> None:
    images = {
        DigitScenes(split, **SMALL, seed=seed).scene(0).image.tobytes()
        for split in ("train", "val")
        for seed in (0, 1)
    }
    assert len(images) == 4
    # Not only other scans in the same places: the size is drawn first.
    sizes = {
        tuple(
            DigitScenes(split, 3, min_size=32, max_size=200, seed=seed).scene(index).image.shape
            for index in range(3)
        )
        for split in ("train", "val")
        for seed in (0, 1)
    }
    assert len(sizes) == 4


def test_no_scan_is_in_both_splits() -> None:
    everything = load_digits()
    seen = {split: [len(scans) for scans in _scans(split)] for split in ("train", "val")}
    for number in range(10):
        assert seen["train"][number] + seen["val"][number] == (everything.target == number).sum()
        assert seen["val"][number] >= 40
        train = {scan.tobytes() for scan in _scans("train")[number]}
        assert train.isdisjoint(scan.tobytes() for scan in _scans("val")[number])


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Scenes without blur and noise; the list gets the ink's colours as they are drawn."""
    colours: list[tuple[int, int, int]] = []
    choose = scenes._ink_colour

    def remember(rng: np.random.Generator, below: Image.Image) -> tuple[int, int, int]:
        colours.append(choose(rng, below))
        return colours[-1]

    monkeypatch.setattr(scenes, "_photograph", lambda rng, canvas: np.asarray(canvas))
    monkeypatch.setattr(scenes, "_ink_colour", remember)
    return colours


def test_boxes_and_keypoints_are_tight_around_readable_ink(
    clean: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = DigitScenes("train", 40, size=(96, 128), glyphs=(1, 1), keypoints=True)
    drawn = [dataset.scene(index) for index in range(40)]
    colours = np.array(clean, float)
    assert len(colours) == 40
    monkeypatch.setattr(scenes, "_free_place", lambda *_: None)
    for index, (scene, colour) in enumerate(zip(drawn, colours, strict=True)):
        paper = dataset.scene(index)  # the same without the digit
        assert len(paper.boxes) == 0
        below = paper.image.astype(float)
        full = colour - below
        opacity = ((scene.image - below) * full).sum(2) / (full**2).sum(2)
        left, top, right, bottom = scene.boxes[0].astype(int)
        ys, xs = np.nonzero(opacity > 0.53)
        assert left <= xs.min() <= xs.max() < right
        assert top <= ys.min() <= ys.max() < bottom
        solid = opacity[top:bottom, left:right] > 0.47
        for side in (solid[0], solid[-1], solid[:, 0], solid[:, -1]):
            assert side.any()
        points = scene.keypoints[0]
        assert (points[:, 2] == 2).all()
        assert points[0, 1] == top + 0.5
        assert points[1, 0] == right - 0.5
        assert points[2, 1] == bottom - 0.5
        assert points[3, 0] == left + 0.5
        assert all(opacity[int(y), int(x)] > 0.47 for x, y, _ in points)
        contrast = (colour - below[top:bottom, left:right].mean((0, 1))) @ (0.299, 0.587, 0.114)
        assert abs(contrast) > 0.29 * 255


def test_digits_of_every_class_and_many_scales_and_shapes() -> None:
    dataset = DigitScenes("train", 300)
    drawn = [dataset.scene(index) for index in range(300)]
    counts = np.bincount([len(scene.labels) for scene in drawn], minlength=9)
    assert counts[0] == 0
    assert (counts[1:] > 0).all()
    boxes = np.concatenate([scene.boxes for scene in drawn])
    labels = np.bincount(np.concatenate([scene.labels for scene in drawn]), minlength=10)
    assert labels.min() > 0.05 * len(boxes)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    shares, _ = np.histogram(height, [0, 9, 16, 25, 40, 64, 103, 128])
    assert shares[0] == shares[-1] == 0
    assert (shares[1:-1] > 0.1 * len(boxes)).all()
    low, middle, high = np.quantile(width / height, [0.05, 0.5, 0.95])
    assert low < 0.6 < 0.7 < middle < 0.95 < 1.3 < high
    assert (width / height).max() < 2.4


def test_boxes_are_inside_and_cover_each_other_little() -> None:
    dataset = DigitScenes("val", 60, min_size=64, max_size=160)
    sizes = set()
    for index in range(60):
        image, target = dataset[index]
        height, width = image.shape[1:]
        sizes |= {height, width}
        boxes = target["boxes"]
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        common = (
            (
                torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
                - torch.maximum(boxes[:, None, :2], boxes[:, :2])
            )
            .clamp(min=0)
            .prod(2)
        )
        common.fill_diagonal_(0)
        smaller = torch.minimum(target["area"][:, None], target["area"])
        assert (common <= 0.15 * smaller).all()
    assert 64 <= min(sizes) < 80
    assert 144 < max(sizes) <= 160


def test_keypoints_below_another_digit_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_MAX_COVER", 1)
    dataset = DigitScenes("val", 20, size=(64, 64), keypoints=True, glyphs=(6, 8))
    hidden = 0
    for index in range(20):
        scene = dataset.scene(index)
        assert (scene.keypoints[-1, :, 2] == 2).all()
        for place, x, y in (
            (place, x, y)
            for place, points in enumerate(scene.keypoints)
            for x, y, visible in points
            if visible == 1
        ):
            later = scene.boxes[place + 1 :]
            assert ((later[:, :2] <= (x, y)) & (later[:, 2:] > (x, y))).all(1).any()
            hidden += 1
    assert 20 < hidden < 200


def test_clutter_is_no_object(clean: list[tuple[int, int, int]]) -> None:
    """Without clutter the paper is smooth; with it there are edges outside of the boxes."""

    def steepest(clutter: int) -> float:
        dataset = DigitScenes("val", 12, glyphs=(1, 1), clutter=clutter)
        steps = []
        for index in range(12):
            scene = dataset.scene(index)
            image = scene.image.astype(float)
            left, top, right, bottom = scene.boxes[0].astype(int)
            image[max(0, top - 3) : bottom + 3, max(0, left - 3) : right + 3] = np.nan
            steps.append(np.nanmax(abs(np.diff(image, axis=1))))
        return float(np.median(steps))

    assert steepest(0) < 20
    assert steepest(8) > 60


def test_items() -> None:
    dataset = open_dataset("digits", "val", num_images=3, size=[48, 64], keypoints=True)
    assert isinstance(dataset, DigitScenes)
    assert len(dataset) == 3
    assert dataset.num_keypoints == 4
    scene = dataset.scene(1)
    image, target = dataset[1]
    assert image.shape == (3, 48, 64)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    np.testing.assert_array_equal((image * 255).round().permute(1, 2, 0).numpy(), scene.image)
    number = len(scene.labels)
    assert target["boxes"].shape == (number, 4)
    assert target["keypoints"].shape == (number, 4, 3)
    assert target["labels"].dtype == torch.int64
    assert target["labels"].tolist() == [label + 1 for label in scene.labels]
    assert int(target["image_id"]) == dataset.coco["images"][1]["id"] == 2
    mine = [each for each in dataset.coco["annotations"] if each["image_id"] == 2]
    assert [dataset.classes[each["category_id"] - 1] for each in mine] == [
        str(label) for label in scene.labels
    ]
    with pytest.raises(IndexError, match="expected a scene from 0 to 2, got 3"):
        dataset[3]


def test_what_is_returned_may_be_changed() -> None:
    dataset = DigitScenes("val", 1, size=(64, 64), cache=True, keypoints=True)
    image, target = dataset[0]
    before = image.clone()
    image.zero_()
    for value in target.values():
        value.zero_()
    again, untouched = dataset[0]
    assert torch.equal(again, before)
    assert all(untouched[key].any() for key in ("boxes", "labels", "keypoints"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "expected split to be one of .*, got 'test'"),
        ({"num_images": 0}, "num_images of at least 1, got 0"),
        ({"size": (16, 64)}, r"at least 32 pixels, got \(16, 64\)"),
        ({"min_size": 64}, "both min_size and max_size or none, got 64 and None"),
        ({"min_size": 80, "max_size": 64}, r"min_size of at most max_size, got \(80, 64\)"),
        ({"seed": -1}, "a seed of at least 0, got -1"),
        ({"glyphs": (0, 3)}, "1 <= least <= most"),
        ({"heights": (4, 30)}, "8 <= least <= most"),
        ({"clutter": -1}, "clutter of at least 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitScenes(**{"split": "train", **options})

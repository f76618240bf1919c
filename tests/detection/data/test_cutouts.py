"""Scenes of a folder's transparent pictures: classes, splits, tight boxes, angles, errors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dyhead_cuda.detection.data import CutoutScenes, DataConfig, open_dataset, scenes
from dyhead_cuda.detection.names import SPLITS

RED, GREEN, BLUE = (230, 20, 20), (20, 220, 30), (20, 30, 230)
PLAIN: dict[str, Any] = {"background": "paper", "clutter": 0}


def save(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (60, 40)) -> None:
    """A filled bar of ``size`` in the middle of a transparent picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (100, 100))
    left, top = (100 - size[0]) // 2, (100 - size[1]) // 2
    corners = (left, top, left + size[0] - 1, top + size[1] - 1)
    ImageDraw.Draw(picture).rectangle(corners, (*colour, 255))
    picture.save(path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save(tmp_path / "red.png", RED)
    save(tmp_path / "green.webp", GREEN)
    save(tmp_path / "blue.PNG", BLUE)
    (tmp_path / ".hidden.png").write_text("no picture")
    (tmp_path / "readme.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes without blur and noise."""
    monkeypatch.setattr(scenes, "_photograph", lambda rng, canvas: np.asarray(canvas))


def test_each_file_is_a_class(files: Path) -> None:
    train, val = (CutoutScenes(files, split, 4) for split in ("train", "val"))
    assert train.classes == val.classes == ("blue", "green", "red")
    assert train.category_ids == (1, 2, 3)
    assert {entry["supercategory"] for entry in train.coco["categories"]} == {"object"}
    assert train[0][0].shape == (3, 256, 256)
    shown = {split.scene(index).image.tobytes() for split in (train, val) for index in range(4)}
    assert len(shown) == 8


@pytest.mark.parametrize(
    ("count", "train", "val"), [(1, "0", "0"), (2, "0", "1"), (3, "01", "2"), (9, "0123456", "78")]
)
def test_each_folder_is_a_class_and_some_of_its_files_are_only_in_val(
    count: int, train: str, val: str, tmp_path: Path
) -> None:
    save(tmp_path / "other" / "a.png", BLUE)
    for number in range(count):
        save(tmp_path / "many" / f"{number}.png", RED)
    for split, expected in zip(SPLITS, (train, val), strict=True):
        dataset = open_dataset("cutouts", split, path=str(tmp_path), num_images=1)
        assert isinstance(dataset, CutoutScenes)
        assert dataset.classes == ("many", "other")
        used = [source.path.stem for source in dataset._objects[0]]  # type: ignore[attr-defined]
        assert "".join(used) == expected


@pytest.mark.usefixtures("clean")
def test_boxes_and_keypoints_are_tight_and_colours_are_kept(files: Path) -> None:
    options: dict[str, Any] = {**PLAIN, "glyphs": (1, 1), "heights": (12, 90), "keypoints": True}
    dataset = CutoutScenes(files, "val", 25, size=(128, 160), **options)
    seen = set()
    for index in range(25):
        scene = dataset.scene(index)
        (label,), (box,) = scene.labels, scene.boxes.astype(int)
        left, top, right, bottom = box
        inside = scene.image[top:bottom, left:right]
        middle = inside[(bottom - top) // 2, (right - left) // 2].astype(float)
        colour = np.array((BLUE, GREEN, RED)[label], float)
        # Only the brightness was changed.
        assert np.corrcoef(middle, colour)[0, 1] > 0.99
        near = abs(scene.image - middle).sum(2) < 60
        ys, xs = np.nonzero(near)
        assert left - 1 <= xs.min() <= left + 2
        assert right - 2 <= xs.max() + 1 <= right + 1
        assert top - 1 <= ys.min() <= top + 2
        assert bottom - 2 <= ys.max() + 1 <= bottom + 1
        points = scene.keypoints[0]
        assert (points[:, 2] == 2).all()
        extremes = points[0, 1], points[1, 0], points[2, 1], points[3, 0]
        assert extremes == (top + 0.5, right - 0.5, bottom - 0.5, left + 0.5)
        seen.add(int(label))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("height", [10, 60, 200])
def test_objects_are_drawn_whole(height: int, files: Path) -> None:
    """Smaller, larger and much larger than their pictures, which are 40 pixels high."""
    options: dict[str, Any] = {**PLAIN, "glyphs": (1, 1), "heights": (height, height)}
    dataset = CutoutScenes(files, "train", 6, **options)
    for index in range(6):
        (box,) = dataset.scene(index).boxes
        assert abs(box[3] - box[1] - height) <= 2


@pytest.mark.parametrize("angle", [0, 90])
def test_objects_are_turned_as_far_as_is_said(angle: float, tmp_path: Path) -> None:
    """A bar four times as wide as high lies flat, unless it is turned."""
    save(tmp_path / "bar.png", RED, (80, 20))
    options: dict[str, Any] = {**PLAIN, "glyphs": (1, 1), "heights": (16, 30), "max_angle": angle}
    dataset = CutoutScenes(tmp_path, "train", 40, **options)
    boxes = np.concatenate([dataset.scene(index).boxes for index in range(40)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    upright = int((height > width).sum())
    assert (8 < upright < 32) if angle else upright == 0


def test_objects_have_all_sizes(files: Path) -> None:
    dataset = CutoutScenes(files, "train", 50)
    boxes = np.concatenate([dataset.scene(index).boxes for index in range(50)])
    height = boxes[:, 3] - boxes[:, 1]
    assert 14 <= height.min() < 20
    assert 170 < height.max() <= 0.8 * 256 + 1
    shares, _ = np.histogram(np.log2(height / 16), [-1, 1, 2, 4])
    assert (shares > 0.15 * len(height)).all()


def test_a_scene_depends_on_its_index_alone_also_in_other_processes(files: Path) -> None:
    dataset = CutoutScenes(files, "train", 5)
    expected = dataset.scene(3).image
    CutoutScenes(files, "val", 5).scene(2)
    copied = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copied.scene(3).image, expected)


def test_settings_of_a_run_can_be_stored(files: Path) -> None:
    config = DataConfig("cutouts", {"path": str(files), "size": [64, 64]}, val={"num_images": 2})
    image, target = DataConfig.from_dict(config.to_dict()).open("val")[1]
    assert image.shape == (3, 64, 64)
    assert target["labels"].dtype == torch.int64


def spoil(path: Path, kind: str) -> None:
    if kind == "opaque":
        Image.new("RGB", (20, 20), "red").save(path / "bad.png")
    elif kind == "transparent":
        Image.new("RGBA", (20, 20), (255, 0, 0, 100)).save(path / "bad.png")
    elif kind == "damaged":
        (path / "bad.png").write_bytes((path / "red.png").read_bytes()[:80])
    elif kind == "both":
        save(path / "class" / "a.png", RED)
    elif kind == "twice":
        save(path / "red.webp", RED)
    else:
        for each in path.glob("*.[pPw]*"):
            each.unlink()
        if kind == "empty class":
            save(path / "class" / "a.png", RED)
            (path / "none").mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("opaque", r"bad\.png has no alpha channel"),
        ("transparent", r"bad\.png is transparent"),
        ("damaged", r"bad\.png cannot be read"),
        ("both", r"got sub-folders and blue\.PNG; move it"),
        ("twice", r"different names in .*, got two of red$"),
        ("empty", r"expected transparent pictures \(\.png, \.webp\) in \S+, found none"),
        ("empty class", r"in \S+none, found none"),
    ],
)
def test_folders_that_cannot_be_used(kind: str, message: str, files: Path) -> None:
    spoil(files, kind)
    with pytest.raises(ValueError, match=message) as caught:
        CutoutScenes(files, "train", 1)
    assert "\n" not in str(caught.value)


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        CutoutScenes(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r'"cutouts" with the option path, .* got .cutouts.'):
        open_dataset("cutouts", "train")

"""COCO-format folders: layouts, every kind of broken annotation, pictures of every kind."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from dyhead_cuda.detection.data import (
    CocoFolder,
    DigitScenes,
    HorizontalFlip,
    collate,
    open_dataset,
    write_coco,
)
from dyhead_cuda.detection.data.coco_checks import KINDS
from dyhead_cuda.detection.evaluation import score

SIZES = {1: (60, 40), 2: (50, 70), 3: (33, 35)}  # width, height by image id
Content = dict[str, Any]


def picture(number: int) -> NDArray[np.uint8]:
    width, height = SIZES[number]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)


def content() -> Content:
    boxes = [
        (10, 1, 30, [5, 6, 20, 10]),
        (11, 1, 90, [0, 0, 60, 40]),
        (12, 2, 30, [1.5, 2.5, 30.25, 40]),
        (13, 3, 30, [3, 3, 10, 10]),
    ]
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
            for number, (width, height) in SIZES.items()
        ],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 50}
            for number, image, category, box in boxes
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 30, "name": "kite"}],
    }


def save(folder: Path, what: Content, annotations: str, images: str) -> Path:
    (folder / annotations).parent.mkdir(parents=True, exist_ok=True)
    (folder / annotations).write_text(json.dumps(what))
    (folder / images).mkdir(parents=True, exist_ok=True)
    for number in SIZES:
        Image.fromarray(picture(number)).save(folder / images / f"{number}.png")
    return folder


def save_usual(folder: Path, what: Content) -> Path:
    return save(folder, what, "annotations/instances_train2017.json", "train2017")


@pytest.mark.parametrize(
    ("annotations", "images", "split"),
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_train.json", "train", "train"),
        ("annotations/instances_train.json", "images/train", "train"),
        ("annotations/instances_train_small.json", "images/train2017", "train"),
        ("annotations/instances_minival.json", "minival", "minival"),
        ("annotations/instances_val.json", "images", "val"),
        ("annotations/instances_val.json", ".", "val"),
        ("train/_annotations.coco.json", "train", "train"),
        ("valid/_annotations.coco.json", "valid", "val"),
        ("annotations_val.json", "val2017", "val"),
        ("val.json", "val", "val"),
    ],
)
def test_layouts(tmp_path: Path, annotations: str, images: str, split: str) -> None:
    dataset = CocoFolder(save(tmp_path, content(), annotations, images), split, strict=True)
    assert dataset.annotations == tmp_path / annotations
    assert len(dataset) == 3
    expected = torch.from_numpy(picture(2)).permute(2, 0, 1) / 255
    torch.testing.assert_close(dataset[1][0], expected)


def test_items_and_ground_truth(tmp_path: Path) -> None:
    dataset = CocoFolder(save_usual(tmp_path, content()), "train", strict=True)
    assert dataset.problems == {}
    assert dataset.classes == ("kite", "toothbrush")
    assert dataset.category_ids == (30, 90)
    assert dataset.num_keypoints == 0
    image, target = dataset[0]
    assert image.shape == (3, 40, 60)
    assert image.dtype == torch.float32
    assert target["boxes"].tolist() == [[5, 6, 25, 16], [0, 0, 60, 40]]
    assert target["labels"].tolist() == [1, 2]
    assert int(target["image_id"]) == 1
    assert target["area"].tolist() == [50, 50]
    assert dataset[1][1]["boxes"].tolist() == [[1.5, 2.5, 31.75, 42.5]]
    images, targets = collate([dataset[index] for index in range(3)])
    assert [tuple(each.shape[1:]) for each in images] == [(40, 60), (70, 50), (35, 33)]
    assert [len(each["boxes"]) for each in targets] == [2, 1, 1]
    assert [each["id"] for each in dataset.coco["annotations"]] == [1, 2, 3, 4]


Change = Callable[[Content, Path], Any]


def change(**fields: Any) -> Change:
    """A change of the annotation 10."""
    return lambda what, _: what["annotations"][0].update(fields)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


# Kind, change, boxes and images that remain (of 4 and 3), a part of the message.
BROKEN: dict[str, tuple[str, Change, int, int, str]] = {
    "missing file": (
        "missing image file",
        lambda what, images: (images / "2.png").unlink(),
        3,
        2,
        "2.png",
    ),
    "no image": (
        "unreadable image",
        lambda what, images: (images / "2.png").write_text("not an image"),
        3,
        2,
        "cannot identify image file",
    ),
    "empty file": (
        "unreadable image",
        lambda what, images: (images / "2.png").write_bytes(b""),
        3,
        2,
        "2.png",
    ),
    "partly outside": ("box outside its image", change(bbox=[50, 30, 20, 20]), 4, 3, "60 x 40"),
    "outside": ("box outside its image", change(bbox=[70, 0, 5, 5]), 3, 3, "annotation 10 of"),
    "nan": ("non-finite box", change(bbox=[math.nan, 0, 5, 5]), 3, 3, "annotation 10 of image 1"),
    "infinite": ("non-finite box", change(bbox=[0, 0, math.inf, 5]), 3, 3, "inf"),
    "flat": ("empty box", change(bbox=[5, 5, 5, 0]), 3, 3, "annotation 10 of image 1 (1.png)"),
    "negative": ("empty box", change(bbox=[5, 5, -5, 5]), 3, 3, "-5"),
    "three values": ("malformed box", change(bbox=[1, 2, 3]), 3, 3, "expected [x, y, width"),
    "words": ("malformed box", change(bbox=["1", 2, 3, 4]), 3, 3, "got ['1', 2, 3, 4]"),
    "no box": ("malformed box", lambda what, _: what["annotations"][0].pop("bbox"), 3, 3, "None"),
    "category": ("unknown category", change(category_id=31), 3, 3, ": 31"),
    "annotation twice": ("duplicate annotation id", change(id=11), 3, 3, "such as 11"),
    "image twice": (
        "duplicate image id",
        lambda what, _: what["images"].append({**what["images"][0], "file_name": "x.png"}),
        4,
        3,
        "1 (x.png)",
    ),
    "category twice": (
        "duplicate category id",
        lambda what, _: what["categories"].append({"id": 30, "name": "boat"}),
        4,
        3,
        "such as 30",
    ),
    "category without id": (
        "malformed category",
        lambda what, _: what["categories"].append({"name": "boat"}),
        4,
        3,
        "boat",
    ),
    "image without name": (
        "malformed image entry",
        lambda what, _: what["images"].append({"id": 9}),
        4,
        3,
        "{'id': 9}",
    ),
    "unknown image": ("annotation of an unknown image", change(image_id=77), 3, 3, "image 77"),
    "no annotations": (
        "image without annotations",
        lambda what, _: what["annotations"].pop(),
        3,
        3,
        "3.png",
    ),
    "size": (
        "image size differs from the json",
        lambda what, _: what["images"][0].update(width=61),
        4,
        3,
        "1.png is 60 x 40, json 61 x 40",
    ),
    "keypoints": (
        "malformed keypoints",
        lambda what, _: (
            what["categories"][1].update(keypoints=["nose", "tail"]),
            what["annotations"][0].update(keypoints=[1, 2, 2]),
        ),
        3,
        3,
        "expected 6 finite numbers, got [1, 2, 2]",
    ),
}


def test_every_kind_of_problem_is_tested() -> None:
    assert {kind for kind, *_ in BROKEN.values()} | {"damaged image"} == set(KINDS)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotations(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, breaks, boxes, images, message = BROKEN[case]
    what = content()
    save_usual(tmp_path, what)
    breaks(what, tmp_path / "train2017")
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(what))

    dataset = CocoFolder(tmp_path, "train")
    assert set(dataset.problems) == {kind}
    assert dataset.problems[kind].count == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "dyhead_cuda.detection"
    assert f"{kind} ({KINDS[kind]}): 1" in record.getMessage()
    assert message in record.getMessage()
    assert len(dataset) == images
    targets = [dataset[index][1] for index in range(images)]
    assert sum(len(target["boxes"]) for target in targets) == boxes
    assert len(dataset.coco["annotations"]) == boxes
    for image, target in (dataset[index] for index in range(images)):
        height, width = image.shape[1:]
        assert (target["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()

    with pytest.raises(ValueError, match="without problems \\(strict\\), found") as error:
        CocoFolder(tmp_path, "train", strict=True)
    assert kind in str(error.value)
    assert message in str(error.value)


def test_one_warning_per_kind_with_the_first_cases(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    what = content()
    for number in range(100, 120):
        what["annotations"].append(
            {"id": number, "image_id": 1, "category_id": 30, "bbox": [0, 0, 0, number]}
        )
    what["annotations"][0]["category_id"] = 5
    dataset = CocoFolder(save_usual(tmp_path, what), "train")
    assert len(caplog.records) == 2
    assert dataset.problems["empty box"].count == 20
    assert len(dataset.problems["empty box"].examples) == 5
    with pytest.raises(ValueError, match=r"empty box .*: 20, such as annotation 100") as error:
        CocoFolder(tmp_path, "train", strict=True)
    assert "annotation 119" not in str(error.value)


def test_a_partly_outside_box_is_clipped_and_rounding_is_no_problem(tmp_path: Path) -> None:
    what = content()
    what["annotations"][0]["bbox"] = [-0.5, 20, 60.9, 20.4]
    assert CocoFolder(save_usual(tmp_path, what), "train", strict=True)[0][1]["boxes"][
        0
    ].tolist() == [0, 20, 60, 40]
    what["annotations"][0]["bbox"] = [-5, 30, 15, 40]
    dataset = CocoFolder(save_usual(tmp_path, what), "train")
    assert dataset[0][1]["boxes"][0].tolist() == [0, 30, 10, 40]
    assert dataset.coco["annotations"][0]["bbox"] == [0, 30, 10, 10]


def test_damaged_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    what = content()
    save_usual(tmp_path, what)
    cut(tmp_path / "train2017" / "2.png", 0.5)
    dataset = CocoFolder(tmp_path, "train")
    for _ in range(2):
        image, target = dataset[1]
        assert image.shape == (3, 70, 50)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["area"]) == 0
    assert len(caplog.records) == 1
    assert "2.png is damaged" in caplog.text
    assert dataset.problems["damaged image"].count == 2
    assert len(dataset[0][1]["boxes"]) == 2
    strict = CocoFolder(tmp_path, "train", strict=True)
    with pytest.raises(ValueError, match=r"2\.png is damaged"):
        strict[1]
    Image.fromarray(picture(3)).save(tmp_path / "train2017" / "2.png")
    with pytest.raises(ValueError, match=r"no longer 50 x 70 pixels, but \(33, 35\)"):
        strict[1]


def test_crowds_are_for_evaluation_only(tmp_path: Path) -> None:
    what = content()
    what["annotations"][0] |= {"iscrowd": 1, "segmentation": {"counts": [], "size": [40, 60]}}
    dataset = CocoFolder(save_usual(tmp_path, what), "train", strict=True)
    assert dataset[0][1]["labels"].tolist() == [2]
    assert [each["iscrowd"] for each in dataset.coco["annotations"]] == [1, 0, 0, 0]


def test_an_annotation_with_id_0_counts(tmp_path: Path) -> None:
    what = content()
    what["annotations"][0]["id"] = 0
    dataset = CocoFolder(save_usual(tmp_path, what), "train", strict=True)
    found = [{**each, "score": 0.5} for each in dataset.coco["annotations"]]
    assert score(dataset, found).summary["AP"] == pytest.approx(1)


def test_keypoints(tmp_path: Path) -> None:
    what = content()
    what["categories"][1]["keypoints"] = ["nose", "tail"]
    what["annotations"][0] |= {"keypoints": [6, 7, 2, 0, 0, 0], "num_keypoints": 1}
    dataset = CocoFolder(save_usual(tmp_path, what), "train", strict=True)
    assert dataset.num_keypoints == 2
    points = dataset[0][1]["keypoints"]
    assert points.tolist() == [[[6, 7, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert [each["num_keypoints"] for each in dataset.coco["annotations"]] == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="expected a dataset without keypoints"):
        HorizontalFlip(dataset)
    what["categories"][0]["keypoints"] = ["handle"]
    with pytest.raises(ValueError, match=r"same number of keypoints in .*, got \[1, 2\]"):
        CocoFolder(save_usual(tmp_path, what), "train")


def test_classes_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    what = content()
    what["categories"] = [{"id": 90, "name": "kite"}, {"id": 30, "name": "kite"}, {"id": 31}]
    dataset = CocoFolder(save_usual(tmp_path, what), "train", strict=True)
    assert dataset.classes == ("kite (30)", "31", "kite (90)")


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    what = content()
    folder = save_usual(tmp_path, what) / "train2017"
    grey = picture(1)[..., 0]
    Image.fromarray(grey).save(folder / "1.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter turn clockwise
    Image.fromarray(picture(2)).save(folder / "2.png", exif=turned)
    what["images"][1] |= {"width": 70, "height": 50}
    Image.fromarray(picture(3)).save(folder / "3.png", exif=turned)  # the json has the raw size
    what["images"].append({"id": 4, "file_name": "deep.png"})
    what["annotations"].append({"image_id": 4, "category_id": 30, "bbox": [0, 0, 9, 9]})
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(what))
    dataset = CocoFolder(tmp_path, "train", strict=True)
    images = [(dataset[index][0] * 255).round().permute(1, 2, 0).numpy() for index in range(4)]
    np.testing.assert_array_equal(images[0], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(images[1], np.rot90(picture(2), -1))
    np.testing.assert_array_equal(images[2], picture(3))
    np.testing.assert_array_equal(images[3], images[0])
    assert dataset.coco["images"][3] == {
        "id": 4,
        "file_name": "deep.png",
        "height": 40,
        "width": 60,
    }
    assert dataset[3][1]["area"].tolist() == [81]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", 'expected a list "images"'),
        ('{"images": [], "categories": []}', 'expected a list "annotations"'),
        ('{"images": [3], "annotations": [], "categories": []}', "expected objects in the list"),
        ('{"images": [], "annotations": [], "categories": []}', 'at least one entry in "images"'),
    ],
)
def test_json_of_another_format(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        CocoFolder(tmp_path, "train")


def test_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"instances_val\.json.*valid/_annotations\.coco\.json"):
        CocoFolder(tmp_path, "val")
    with pytest.raises(ValueError, match="is not a folder"):
        CocoFolder(tmp_path / "nowhere", "val")
    with pytest.raises(ValueError, match='expected "digits" or a folder'):
        open_dataset(str(tmp_path / "nowhere"), "val")
    (tmp_path / "val.json").write_text(json.dumps(content()))
    with pytest.raises(ValueError, match=r"such as 1\.png\), found none in .*val2017.*images/val"):
        CocoFolder(tmp_path, "val")
    (tmp_path / "annotations").mkdir()
    for name in ("2014", "2017"):
        (tmp_path / f"annotations/instances_val{name}.json").write_text(json.dumps(content()))
    with pytest.raises(ValueError, match=r"got instances_val2014\.json, instances_val2017\.json"):
        CocoFolder(tmp_path, "val")


def test_nothing_usable(tmp_path: Path) -> None:
    folder = save_usual(tmp_path, content()) / "train2017"
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"at least one usable image .* found 0 and 2: unreadable"):
        CocoFolder(tmp_path, "train")


def test_mirrored_at_random(tmp_path: Path) -> None:
    dataset = open_dataset(save_usual(tmp_path, content()), "train", strict=True)
    image, target = dataset[0]
    mirrored, other = HorizontalFlip(dataset, 1)[0]
    assert torch.equal(mirrored, image.flip(2))
    assert other["boxes"].tolist() == [[35, 6, 55, 16], [0, 0, 60, 40]]
    assert torch.equal(other["labels"], target["labels"])
    assert torch.equal(HorizontalFlip(dataset, 0)[0][0], image)
    assert HorizontalFlip(dataset).coco is dataset.coco

    def draws(seed: int) -> list[bool]:
        torch.manual_seed(seed)
        flipping = HorizontalFlip(dataset)
        return [torch.equal(flipping[0][0], image) for _ in range(64)]

    assert draws(1) == draws(1) != draws(2)
    assert 16 < sum(draws(1)) < 48
    with pytest.raises(ValueError, match=r"of 0 to 1, got 1\.5"):
        HorizontalFlip(dataset, 1.5)


@pytest.mark.parametrize("keypoints", [False, True])
def test_digits_come_back_from_disk(tmp_path: Path, keypoints: bool) -> None:
    for split in ("train", "val"):
        scenes = DigitScenes(split, 5, min_size=48, max_size=80, keypoints=keypoints)
        path = write_coco(scenes, tmp_path)
        back = CocoFolder(tmp_path, split, strict=True)
        assert back.annotations == path
        assert back.classes == scenes.classes
        assert back.category_ids == scenes.category_ids
        assert back.num_keypoints == scenes.num_keypoints == 4 * keypoints
        assert back.coco["annotations"] == scenes.coco["annotations"]
        for index in range(5):
            image, target = scenes[index]
            other, other_target = back[index]
            assert torch.equal(image, other)
            assert target.keys() == other_target.keys()
            for key, value in target.items():
                assert torch.equal(value, other_target[key]), key
                assert value.dtype == other_target[key].dtype
    read = COCO(str(tmp_path / "annotations/instances_val.json"))
    assert len(read.getImgIds()) == 5
    assert [each["name"] for each in read.loadCats(read.getCatIds())] == list("0123456789")
    boxes = torch.tensor([each["bbox"] for each in read.loadAnns(read.getAnnIds(imgIds=[3]))])
    expected = scenes[2][1]["boxes"]
    assert torch.equal(boxes[:, :2] + boxes[:, 2:], expected[:, 2:])

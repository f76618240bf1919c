"""COCO-format folders: layouts, items, pictures of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
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
from dyhead_cuda.detection.evaluation import score
from tests.helpers.detection.coco_folders import content, cut, picture, save, save_usual


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
    with pytest.raises(ValueError, match='expected "digits", "cutouts" with the option path, or'):
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

"""COCO-format folders: every kind of broken annotation, and what no tool should have written."""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyhead_cuda.detection.data import CocoFolder
from dyhead_cuda.detection.data.coco_checks import KINDS
from tests.helpers.detection.coco_folders import Change, Content, change, content, save_usual


def save_header(path: Path, width: int, height: int) -> None:
    """A PNG file of that size, without the pixels."""
    Image.new("L", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def widen(what: Content, path: Path, box: list[float]) -> None:
    save_header(path, 20000, 200)
    what["images"][2].update(width=20000, height=200)
    what["annotations"][3]["bbox"] = box


def replace_by(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


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
    "vanishing at the edge": (
        "box outside its image",
        change(bbox=[59.9999999, 10, 10, 12]),
        3,
        3,
        "[59.9999999, 10, 10, 12] in 60 x 40 pixels",
    ),
    "vanishing in float32": (
        "empty box",
        change(bbox=[30.000001, 10, 1e-7, 12]),
        3,
        3,
        "annotation 10 of image 1 (1.png): [30.000001, 10, 1e-07, 12]",
    ),
    "next to nothing": ("empty box", change(bbox=[3, 10, 0.009, 12]), 3, 3, "at least 0.01"),
    "vanishing far to the right": (
        "empty box",
        lambda what, images: widen(what, images / "3.png", [19000, 10, 0.015, 12]),
        3,
        3,
        "[19000, 10, 0.015, 12] in 20000 x 200 pixels",
    ),
    "400 digits": ("non-finite box", change(bbox=[0, 0, 10**400, 5]), 3, 3, "annotation 10 of"),
    "beyond float32": ("non-finite box", change(bbox=[0, 0, 1e39, 5]), 3, 3, "1e+39"),
    "truth values": ("malformed box", change(bbox=[False, 0, True, 5]), 3, 3, "False"),
    "null": ("malformed box", change(bbox=[None, 0, 3, 5]), 3, 3, "None"),
    "area in words": ("malformed area", change(area="50"), 4, 3, "annotation 10 of image 1"),
    "area of 400 digits": ("malformed area", change(area=10**400), 4, 3, "1000"),
    "area of nan": ("malformed area", change(area=math.nan), 4, 3, "nan"),
    "crowd in words": ("malformed iscrowd", change(iscrowd="0"), 3, 3, "expected 0 or 1, got '0'"),
    "category of truth": (
        "unknown category",
        lambda what, _: (
            what["categories"].append({"id": 1, "name": "one"}),
            what["annotations"][0].update(category_id=True),
        ),
        3,
        3,
        ": True",
    ),
    "category in a list": ("unknown category", change(category_id=[30]), 3, 3, "[30]"),
    "image id of 400 digits": (
        "malformed image entry",
        lambda what, _: what["images"].append({"id": 10**400, "file_name": "1.png"}),
        4,
        3,
        "1.png",
    ),
    "annotated image of 400 digits": (
        "annotation of an unknown image",
        change(image_id=10**400),
        3,
        3,
        "image 1000",
    ),
    "category id of 400 digits": (
        "malformed category",
        lambda what, _: what["categories"].append({"id": 10**400, "name": "boat"}),
        4,
        3,
        "{'id': 1000",
    ),
    "category with a list for a name": (
        "malformed category",
        lambda what, _: what["categories"].append({"id": 31, "name": ["boat"]}),
        4,
        3,
        "['boat']",
    ),
    "keypoint names": (
        "malformed keypoint names",
        lambda what, _: what["categories"][1].update(keypoints=17),
        4,
        3,
        "category 30: 17",
    ),
    "long file name": (
        "missing image file",
        lambda what, _: what["images"].append({"id": 9, "file_name": "x" * 5000}),
        4,
        3,
        "xxx...",
    ),
    "file name that is no text": (
        "missing image file",
        lambda what, _: what["images"].append({"id": 9, "file_name": "\ud800\x00\n.png"}),
        4,
        3,
        "\\ud800\\x00\\n.png",
    ),
    "a folder for a file": (
        "missing image file",
        lambda what, images: replace_by(images / "2.png", Path.mkdir),
        3,
        2,
        "2.png",
    ),
    "a circle of links": (
        "missing image file",
        lambda what, images: replace_by(images / "2.png", lambda path: path.symlink_to(path)),
        3,
        2,
        "2.png",
    ),
    "a picture beyond Pillow's limit": (
        "too large image",
        lambda what, images: save_header(images / "2.png", 20000, 20000),
        3,
        2,
        "2.png (Image size (400000000 pixels)",
    ),
    "a picture that Pillow warns of": (
        "too large image",
        lambda what, images: save_header(images / "2.png", 10000, 10000),
        3,
        2,
        "2.png (Image size (100000000 pixels)",
    ),
    "a line for a picture": (
        "too narrow image",
        lambda what, images: save_header(images / "2.png", 1, 101),
        3,
        2,
        "2.png is 1 x 101, over 100 to 1",
    ),
    "keypoints beyond float32": (
        "malformed keypoints",
        lambda what, _: (
            what["categories"][1].update(keypoints=["nose"]),
            what["annotations"][0].update(keypoints=[1, 10**400, 2]),
        ),
        3,
        3,
        "expected 3 finite numbers",
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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"images": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"images": [' + b"9" * 5000, "cannot be read"),
        (b"\xff\xfe\x00{", "cannot be read"),
        (b'{"images": "caf\xe9"}', "cannot be read"),
        (b"", "cannot be read"),
    ],
    ids=["deep", "long number", "UTF-16", "Latin-1", "empty"],
)
def test_bytes_that_are_no_json(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "train.json").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        CocoFolder(tmp_path, "train")
    assert str(tmp_path / "train.json") in str(error.value)


def test_what_is_no_file_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "train.json").mkdir()
    with pytest.raises(ValueError, match="no regular file"):
        CocoFolder(tmp_path, "train")
    (tmp_path / "train.json").rmdir()
    os.mkfifo(tmp_path / "train.json")
    with pytest.raises(ValueError, match="no regular file"):
        CocoFolder(tmp_path, "train")


def test_a_mark_of_the_byte_order_is_no_problem(tmp_path: Path) -> None:
    save_usual(tmp_path, content())
    path = tmp_path / "annotations/instances_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(CocoFolder(tmp_path, "train", strict=True)) == 3


def test_nulls_where_something_may_be_left_out(tmp_path: Path) -> None:
    what = content()
    what["annotations"][0] |= {"area": None, "iscrowd": None, "keypoints": None, "id": None}
    what["categories"][0] |= {"keypoints": ["nose"], "name": None}
    what["categories"][1]["keypoints"] = None
    what["images"][0] |= {"width": None, "height": None}
    dataset = CocoFolder(save_usual(tmp_path, what), "train", strict=True)
    assert dataset.classes == ("kite", "90")
    assert dataset[0][1]["area"].tolist() == [200, 50]
    assert dataset[0][1]["keypoints"].shape == (2, 1, 3)


def test_boxes_that_pass_are_boxes_in_float32_after_any_resize(tmp_path: Path) -> None:
    """Whatever narrow boxes are kept, none vanishes where an image is resized or mirrored."""
    rng = np.random.default_rng(0)
    what = content()
    what["annotations"] = [
        {
            "id": number,
            "image_id": 2,
            "category_id": 30,
            "bbox": [float(rng.uniform(0, 50)), float(rng.uniform(0, 70)), *widths],
        }
        for number, widths in enumerate(10 ** rng.uniform(-8, 0, (2000, 2)), 1)
    ]
    boxes = CocoFolder(save_usual(tmp_path, what), "train")[1][1]["boxes"]
    assert 50 < len(boxes) < 1500
    for factor in rng.uniform(0.02, 20, 50).astype(np.float32):
        scaled = boxes * float(factor)
        assert (scaled[:, 2:] > scaled[:, :2]).all()
    mirrored = 50 - boxes
    assert (mirrored[:, :2] > mirrored[:, 2:]).all()
    assert (boxes[:, 2:] <= torch.tensor([50, 70])).all()

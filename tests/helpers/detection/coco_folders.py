"""A small folder in COCO's format, and changes that break it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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


Change = Callable[[Content, Path], Any]


def change(**fields: Any) -> Change:
    """A change of the annotation 10."""
    return lambda what, _: what["annotations"][0].update(fields)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

"""A user's own COCO-format folder as a detection dataset."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from dyhead_cuda.detection.data.base import Target
from dyhead_cuda.detection.data.coco_checks import (
    ImageEntry,
    Problems,
    check_annotations,
    check_categories,
    check_images,
)
from dyhead_cuda.detection.data.coco_layout import find_images, find_json, read_json
from dyhead_cuda.detection.data.pictures import open_image

_LOG = logging.getLogger("dyhead_cuda.detection")


class CocoFolder(Dataset[tuple[Tensor, Target]]):
    """One split of a folder with images and a json in COCO's format.

    Accepted layouts (``split`` may be any name; "val" may also be written "valid"):

    * ``annotations/instances_train2017.json``, ``train2017/*.jpg`` (COCO's own)
    * ``annotations/instances_train.json``, ``train/*`` or ``images/train/*`` or ``images/*``
    * ``train/_annotations.coco.json``, ``train/*`` (Roboflow)
    * ``annotations_train.json`` or ``train.json``, images as above

    Every image file is opened once (its header only) and every annotation checked. What is broken
    is left out or repaired with one logged warning per kind (logger "dyhead_cuda.detection"), and
    counted in ``problems``; see ``coco_checks.KINDS``. An image whose pixels turn out to be damaged
    when it is read gives a black image without objects. Items are those of
    :class:`DetectionDataset`.

    Crowd annotations are in ``coco``, for evaluation, but not in the targets.

    Attributes:
        problems: per kind of problem its count and first examples.
        classes, category_ids, coco, num_keypoints: as in ``DetectionDataset``; classes are in the
            order of their COCO ids.

    Args:
        path: the folder.
        split: "train" or "val".
        annotations: the json, where it is in none of these places.
        images: the folder that the file names in the json count from, where it is none of these.
        strict: raise ValueError at the first look if anything at all is wrong, and when a damaged
            image is read.

    Raises:
        ValueError: no such folder, json or images (with what was looked for), a json in another
            format, no usable image, categories with different numbers of keypoints; with
            ``strict`` any problem.

    Source: https://cocodataset.org/#format-data.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from dyhead_cuda.detection import CocoFolder, DigitScenes, write_coco
        >>> with TemporaryDirectory() as folder:
        ...     path = write_coco(DigitScenes("val", num_images=2, size=(64, 64)), folder)
        ...     dataset = CocoFolder(folder, "val", strict=True)
        ...     image, target = dataset[1]
        >>> len(dataset), list(image.shape), int(target["image_id"]), dict(dataset.problems)
        (2, [3, 64, 64], 2, {})
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        strict: bool = False,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
    ) -> None:
        folder = Path(path)
        self.annotations = find_json(folder, split) if annotations is None else Path(annotations)
        content = read_json(self.annotations)
        self._strict = strict
        self.problems = Problems()
        categories = check_categories(content["categories"], self.problems)
        self.classes: tuple[str, ...] = tuple(entry["name"] for entry in categories)
        self.category_ids: tuple[int, ...] = tuple(entry["id"] for entry in categories)
        self.num_keypoints = _num_keypoints(categories, self.annotations)
        names = [str(entry.get("file_name")) for entry in content["images"]]
        place = find_images(folder, split, self.annotations, names, images)
        self._images, listed = check_images(content["images"], place, self.problems)
        objects = check_annotations(
            content["annotations"],
            self._images,
            listed,
            self.category_ids,
            self.num_keypoints,
            self.problems,
        )
        self.problems.report(self.annotations, strict)
        if not self._images or not self.classes:
            raise ValueError(
                f"expected at least one usable image and category in {self.annotations}, found "
                f"{len(self._images)} and {len(self.classes)}: {'; '.join(self.problems.lines())}"
            )
        self.coco: dict[str, Any] = {
            "images": [
                {"id": at.id, "file_name": at.file_name, "height": at.height, "width": at.width}
                for at in self._images
            ],
            "annotations": objects,
            "categories": categories,
        }
        self._objects: dict[int, list[dict[str, Any]]] = {at.id: [] for at in self._images}
        for annotation in objects:
            if not annotation["iscrowd"]:
                self._objects[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry = self._images[index]
        objects = self._objects[entry.id]
        try:
            image = _read_image(entry)
        except MemoryError:
            raise
        except Exception as error:  # whatever Pillow's decoders raise
            self._damaged(entry, error)
            image, objects = torch.zeros(3, entry.height, entry.width), []
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        # The sum may be rounded up, out of the image.
        boxes[:, 2:] = boxes[:, 2:].minimum(torch.tensor([entry.width, entry.height]))
        labels = [self.category_ids.index(each["category_id"]) + 1 for each in objects]
        target = {
            "boxes": boxes,
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_id": torch.tensor(entry.id),
            "area": torch.tensor([each["area"] for each in objects], dtype=torch.float32),
            "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
        }
        if self.num_keypoints:
            points = torch.tensor([each["keypoints"] for each in objects], dtype=torch.float32)
            target["keypoints"] = points.view(-1, self.num_keypoints, 3)
        return image, target

    def _damaged(self, entry: ImageEntry, error: Exception) -> None:
        message = f"{entry.path} is damaged: {error}"
        if self._strict:
            raise ValueError(f"expected an image that can be read, but {message}") from error
        if "damaged image" not in self.problems:
            _LOG.warning("%s (read as a black image without objects)", message)
        self.problems.add("damaged image", message)


def _num_keypoints(categories: list[dict[str, Any]], source: Path) -> int:
    counts = {len(entry["keypoints"]) for entry in categories if entry.get("keypoints")}
    if len(counts) > 1:
        raise ValueError(
            f"expected categories with the same number of keypoints in {source}, got "
            f"{sorted(counts)}"
        )
    return counts.pop() if counts else 0


def _read_image(entry: ImageEntry) -> Tensor:
    with open_image(entry.path) as image:
        shown = ImageOps.exif_transpose(image) if entry.turn else image
        if shown.mode.startswith("I;16"):  # PIL would cut values above 255
            shown = Image.fromarray((np.asarray(shown) >> 8).astype(np.uint8))
        pixels = np.array(shown.convert("RGB"))
    if pixels.shape[:2] != (entry.height, entry.width):
        raise ValueError(f"it is no longer {entry.width} x {entry.height} pixels, but {shown.size}")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)

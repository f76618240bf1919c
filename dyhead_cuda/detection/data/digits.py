"""Real handwritten digits, composed into scenes: a detection dataset without downloads."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

from dyhead_cuda.detection.data.scenes import Scene, SceneStyle, compose
from dyhead_cuda.detection.names import SPLITS, Split

NUM_IMAGES = {"train": 2000, "val": 400}
KEYPOINT_NAMES = ("top", "right", "bottom", "left")

_VAL_SHARE = 4  # one scan in four is kept for val
_MIN_SIDE = 32


class DigitScenes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Scenes of scikit-learn's handwritten digits at many scales, with clutter that is no digit.

    The digits are the 1,797 scans of ``sklearn.datasets.load_digits`` (8 x 8 pixels, 17 grey
    levels), each at a random height (log-uniform), aspect ratio, angle, shear, stroke width and
    colour. The last quarter of each class's scans is used by "val" alone, and never in "train".

    Item i is an image, float32 [3, H, W], RGB in 0..1, and its target: boxes float32 [n, 4] (x1,
    y1, x2, y2 in pixels, tight around the ink), labels int64 [n] (1 + the digit), image_id int64
    [] (i + 1), area float32 [n] (of the boxes), iscrowd int64 [n], and with ``keypoints`` also
    keypoints float32 [n, 4, 3] (x, y, visibility of the topmost, rightmost, bottommost and
    leftmost ink). It depends on split, seed, i and the options, not on what was read before.

    Args:
        split: "train" or "val".
        num_images: how many scenes (default: 2000 for "train", 400 for "val").
        size: height and width of every scene in pixels.
        min_size, max_size: pixels; instead of ``size``: each side of each scene is drawn between
            them.
        seed: of the scenes.
        keypoints: give the keypoints too.
        cache: keep scenes in memory (3 bytes per pixel) once they are drawn.
        glyphs: minimum and maximum of the digits tried per scene; those without a free place are
            left out.
        heights: minimum and maximum height of a digit in pixels; log-uniform between.
        clutter: maximum of things per scene that are no digit.

    Raises:
        ValueError: unknown split, or options out of range.

    Source: the scans of https://doi.org/10.24432/C50P49, as scikit-learn has them.

    Example:
        >>> from dyhead_cuda.detection import DigitScenes
        >>> scenes = DigitScenes("train", num_images=2, size=(64, 96), keypoints=True)
        >>> image, target = scenes[0]
        >>> list(image.shape), list(target["keypoints"].shape[1:])
        ([3, 64, 96], [4, 3])
        >>> sorted(target)
        ['area', 'boxes', 'image_id', 'iscrowd', 'keypoints', 'labels']
    """

    classes: tuple[str, ...] = tuple("0123456789")
    category_ids: tuple[int, ...] = tuple(range(1, 11))

    def __init__(
        self,
        split: Split,
        num_images: int | None = None,
        *,
        size: tuple[int, int] = (128, 128),
        min_size: int | None = None,
        max_size: int | None = None,
        seed: int = 0,
        keypoints: bool = False,
        cache: bool = False,
        glyphs: tuple[int, int] = (1, 8),
        heights: tuple[float, float] = (10, 100),
        clutter: int = 8,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f'expected split "train" or "val", got {split!r}')
        if (min_size is None) != (max_size is None):
            raise ValueError(
                f"expected both min_size and max_size or none, got {min_size} and {max_size}"
            )
        sides = size if min_size is None or max_size is None else (min_size, max_size)
        if len(sides) != 2 or min(sides) < _MIN_SIDE:
            raise ValueError(f"expected scenes of at least {_MIN_SIDE} pixels, got {sides}")
        if max_size is not None and sides[0] > sides[1]:
            raise ValueError(f"expected min_size of at most max_size, got {sides}")
        self._num_images = NUM_IMAGES[split] if num_images is None else num_images
        if self._num_images < 1:
            raise ValueError(f"expected num_images of at least 1, got {num_images}")
        if seed < 0:
            raise ValueError(f"expected a seed of at least 0, got {seed}")
        self.split: Split = split
        self.num_keypoints = len(KEYPOINT_NAMES) if keypoints else 0
        self._sides, self._one_size = (sides[0], sides[1]), max_size is None
        self._seed = seed
        self._style = SceneStyle(glyphs, heights, clutter)
        self._scans = _scans(split)
        self._cache: dict[int, Scene] | None = {} if cache else None

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        scene = self.scene(index)
        boxes = torch.from_numpy(scene.boxes.copy())
        target = {
            "boxes": boxes,
            "labels": torch.from_numpy(scene.labels + 1),
            "image_id": torch.tensor(index + 1),
            "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        }
        if self.num_keypoints:
            target["keypoints"] = torch.from_numpy(scene.keypoints.copy())
        pixels = torch.from_numpy(scene.image.copy()).permute(2, 0, 1)
        return pixels.float().div_(255).contiguous(), target

    def scene(self, index: int) -> Scene:
        """One scene as numpy arrays; its labels count from 0.

        Args:
            index: from 0.

        Raises:
            IndexError: there is no such scene.
        """
        if not 0 <= index < self._num_images:
            raise IndexError(f"expected a scene from 0 to {self._num_images - 1}, got {index}")
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        # One random stream per scene: it does not depend on which ones were read before.
        key = (SPLITS.index(self.split), index)
        rng = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=key))
        )
        size = self._sides
        if not self._one_size:
            height, width = rng.integers(*self._sides, size=2, endpoint=True)
            size = int(height), int(width)
        scene = compose(rng, size, self._scans, self._style)
        if self._cache is not None:
            self._cache[index] = scene
        return scene

    @functools.cached_property
    def coco(self) -> dict[str, Any]:
        """The ground truth in COCO's format; draws every scene once."""
        category: dict[str, Any] = {"supercategory": "digit"}
        if self.num_keypoints:
            category |= {"keypoints": list(KEYPOINT_NAMES), "skeleton": []}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            scene = self.scene(index)
            height, width = scene.image.shape[:2]
            name = f"{index + 1:06d}.png"
            images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
            for box, label, points in zip(
                scene.boxes.tolist(), scene.labels.tolist(), scene.keypoints, strict=True
            ):
                left, top, right, bottom = box
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": self.category_ids[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
                if self.num_keypoints:
                    annotation["keypoints"] = points.ravel().tolist()
                    annotation["num_keypoints"] = len(points)
                annotations.append(annotation)
        return {
            "info": {"description": f"handwritten digits in scenes, {self.split}"},
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name, **category}
                for number, name in zip(self.category_ids, self.classes, strict=True)
            ],
        }


def write_coco(dataset: DigitScenes, folder: str | Path) -> Path:
    """Writes scenes as a COCO-format folder that any tool reads.

    ``folder/annotations/instances_<split>.json`` and ``folder/<split>/000001.png`` and so on, so
    that both splits fit into one folder.

    Args:
        dataset: the scenes.
        folder: is made if it does not exist.

    Returns:
        The path of the json.

    Raises:
        OSError: the folder cannot be written to.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from dyhead_cuda.detection import DigitScenes, write_coco
        >>> with TemporaryDirectory() as folder:
        ...     path = write_coco(DigitScenes("val", num_images=1, size=(64, 64)), folder)
        >>> path.name
        'instances_val.json'
    """
    folder = Path(folder)
    images = folder / dataset.split
    annotations = folder / "annotations"
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    truth = dataset.coco
    for index, image in enumerate(truth["images"]):
        Image.fromarray(dataset.scene(index).image).save(images / image["file_name"])
    path = annotations / f"instances_{dataset.split}.json"
    path.write_text(json.dumps(truth), encoding="utf-8")
    return path


@functools.cache
def _scans(split: Split) -> Sequence[NDArray[np.uint8]]:
    """Per class the split's scans, uint8 [n, 8, 8], opacity 0..255.

    The file goes writer by writer, so its last quarter is mostly by other hands.
    """
    digits = load_digits()
    opacity = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    per_class = []
    for number in range(10):
        scans = opacity[digits.target == number]
        first_val = len(scans) - len(scans) // _VAL_SHARE
        per_class.append(scans[:first_val] if split == "train" else scans[first_val:])
    return tuple(per_class)

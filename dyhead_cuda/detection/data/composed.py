"""Datasets of composed scenes, and how they are written to files."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dyhead_cuda import checks
from dyhead_cuda.detection.data.backgrounds import photographs
from dyhead_cuda.detection.data.objects import Source
from dyhead_cuda.detection.data.scenes import Scene, SceneStyle, compose
from dyhead_cuda.detection.files import make_folder, write_atomically, writing
from dyhead_cuda.detection.names import SPLITS, Background, Split

NUM_IMAGES = {"train": 2000, "val": 400}
KEYPOINT_NAMES = ("top", "right", "bottom", "left")
# Heights up to what fits. In scenes of 256 pixels an ATSS with anchors of 2 strides then has 0.25,
# 0.32, 0.28 and 0.15 of its positive anchors on P3 to P6.
ALL_SCALES = (16.0, 1000.0)

_MIN_SIDE = 32


class ComposedScenes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Scenes of objects at many scales, angles and aspect ratios, with clutter that is no object.

    What :class:`DigitScenes` and :class:`CutoutScenes` have in common.

    Item i is an image, float32 [3, H, W], RGB in 0..1, and its target: boxes float32 [n, 4] (x1,
    y1, x2, y2 in pixels, tight around what is at least half opaque), labels int64 [n] (1 + the
    class), image_id int64 [] (i + 1), area float32 [n] (of the boxes), iscrowd int64 [n], and with
    ``keypoints`` also keypoints float32 [n, 4, 3] (x, y, visibility of the topmost, rightmost,
    bottommost and leftmost pixel of the object). It depends on split, seed, i and the options, not
    on what was read before.

    The background is "paper", a smooth texture, or "photographs": parts of those that ship with
    scikit-image and scikit-learn, at random scales and colours, mirrored or not. Five of the
    photographs are in "val" alone, the other eleven in "train".

    Args:
        split: "train" or "val".
        num_images: how many scenes (default: 2000 for "train", 400 for "val").
        objects: the sources of each class, of this split.
        classes: their names.
        size: height and width of every scene in pixels.
        min_size, max_size: pixels; instead of ``size``: each side of each scene is drawn between
            them.
        seed: of the scenes.
        keypoints: give the keypoints too.
        cache: keep scenes in memory (3 bytes per pixel) once they are drawn.
        glyphs: minimum and maximum of the objects tried per scene; those without a free place are
            left out.
        heights: minimum and maximum height of an object in pixels; log-uniform between. No object
            is larger than 0.8 of the scene's side.
        clutter: maximum of things per scene that are no object.
        background: "paper" or "photographs".
        max_angle: degrees by which objects are turned to either side, at most 180.

    Raises:
        ValueError: unknown split or background, or options out of range.
        ModuleNotFoundError: photographs without scikit-image.

    Example:
        >>> from dyhead_cuda.detection import ComposedScenes, DigitScenes
        >>> scenes = DigitScenes("val", num_images=2, size=(64, 64), background="photographs")
        >>> isinstance(scenes, ComposedScenes), len(scenes.coco["images"])
        (True, 2)
    """

    kind: ClassVar[str]  # of an object, for COCO's "supercategory"
    description: ClassVar[str]

    def __init__(
        self,
        split: Split,
        num_images: int | None,
        *,
        objects: Sequence[Sequence[Source]],
        classes: Sequence[str],
        size: tuple[int, int],
        min_size: int | None = None,
        max_size: int | None = None,
        seed: int = 0,
        keypoints: bool = False,
        cache: bool = False,
        glyphs: tuple[int, int] = (1, 8),
        heights: tuple[float, float],
        clutter: int = 8,
        background: Background = "paper",
        max_angle: float,
    ) -> None:
        checks.one_of("background", background, get_args(Background))
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
        self.classes = tuple(classes)
        self.category_ids = tuple(range(1, 1 + len(self.classes)))
        self.num_keypoints = len(KEYPOINT_NAMES) if keypoints else 0
        self._sides, self._one_size = (sides[0], sides[1]), max_size is None
        self._seed = seed
        self._style = SceneStyle(glyphs, heights, clutter, max_angle)
        self._objects = objects
        self._background = background
        if background == "photographs":
            photographs(split)  # what is missing is said before the work starts
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
        pictures = photographs(self.split) if self._background == "photographs" else ()
        scene = compose(rng, size, self._objects, self._style, pictures)
        if self._cache is not None:
            self._cache[index] = scene
        return scene

    @functools.cached_property
    def coco(self) -> dict[str, Any]:
        """The ground truth in COCO's format; draws every scene once."""
        category: dict[str, Any] = {"supercategory": self.kind}
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
            "info": {"description": f"{self.description} in scenes, {self.split}"},
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name, **category}
                for number, name in zip(self.category_ids, self.classes, strict=True)
            ],
        }


def write_coco(dataset: ComposedScenes, folder: str | Path) -> Path:
    """Writes scenes as a COCO-format folder that any tool reads.

    ``folder/annotations/instances_<split>.json`` and ``folder/<split>/000001.png`` and so on, so
    that both splits fit into one folder.

    Args:
        dataset: the scenes.
        folder: is made if it does not exist.

    Returns:
        The path of the json.

    Raises:
        WriteError: the folder cannot be written to.

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
    make_folder(images)
    make_folder(annotations)
    truth = dataset.coco
    for index, image in enumerate(truth["images"]):
        picture = images / image["file_name"]
        with writing(picture):
            Image.fromarray(dataset.scene(index).image).save(picture)
    path = annotations / f"instances_{dataset.split}.json"
    write_atomically(path, lambda file: file.write(json.dumps(truth).encode()))
    return path

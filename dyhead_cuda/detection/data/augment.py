"""Sizes of training images, drawn at random: large-scale jitter, and several scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import BoundingBoxes, Image

from dyhead_cuda import checks
from dyhead_cuda.detection.data.base import Augmented, DetectionDataset, Target

_GREY = 0.5
_MIN_SIDE = 1.0  # of a box in pixels; of less, nothing can be seen


class ScaleJitter(Augmented):
    """A dataset of squares: images that are scaled at random, then cropped or padded.

    With scale 1 an image just fits into the square. What does not fit is cut at a random place; the
    rest of the square is grey, the image at a random place in it. Boxes are clipped to the square;
    those with a side below one pixel are dropped. All is drawn from torch's random state each time
    an item is read.

    Args:
        dataset: any detection dataset without keypoints.
        size: of the square, in pixels; ``min_size`` of the detector, which resizes others.
        scales: the smallest and the largest.

    Raises:
        ValueError: a dataset with keypoints, ``size`` below 1, or scales that are not in order or
            not positive.

    Source: arXiv 2012.07177, section 3 (large-scale jittering).

    Example:
        >>> from dyhead_cuda.detection import DigitScenes, ScaleJitter
        >>> scenes = ScaleJitter(DigitScenes("train", num_images=1, size=(48, 96)), 64)
        >>> image, target = scenes[0]
        >>> list(image.shape), bool((target["boxes"] <= 64).all())
        ([3, 64, 64], True)
    """

    def __init__(
        self, dataset: DetectionDataset, size: int, scales: tuple[float, float] = (0.1, 2.0)
    ) -> None:
        super().__init__(dataset, "one of them may be cut off; turn scale jitter off")
        checks.positive(size=size)
        check_range("scales", scales)
        self.size, self.scales = size, scales
        self._crop = v2.RandomCrop(size, pad_if_needed=True, fill=_GREY)
        self._sanitize = v2.SanitizeBoundingBoxes(_MIN_SIDE, labels_getter=lambda items: items[2])

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self.dataset[index]
        height, width = image.shape[-2:]
        low, high = self.scales
        scale = (low + (high - low) * float(torch.rand(()))) * self.size / max(height, width)
        size = [max(1, round(side * scale)) for side in (height, width)]
        boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, width))
        items = [functional.resize(each, size, antialias=True) for each in (Image(image), boxes)]
        ratio = size[0] * size[1] / (height * width)
        before = _areas(items[1])
        image, boxes, kept = self._sanitize(*self._crop(*items, torch.arange(len(boxes))))
        new = {name: target[name] if name == "image_id" else target[name][kept] for name in target}
        new["boxes"] = boxes.as_subclass(Tensor)
        # Of an object that is cut, as much is left as of its box.
        new["area"] = new["area"] * ratio * _areas(boxes) / before[kept]
        return image.as_subclass(Tensor), new


def _areas(boxes: Tensor) -> Tensor:
    sides = boxes.as_subclass(Tensor)[:, 2:] - boxes.as_subclass(Tensor)[:, :2]
    return sides.prod(dim=1)


def check_range(name: str, values: tuple[float, float]) -> None:
    """Raise ValueError unless these are two positive numbers in order."""
    numbers = len(values) == 2 and all(isinstance(value, int | float) for value in values)
    if not numbers or not 0 < values[0] <= values[1] < math.inf:
        raise ValueError(f"expected {name} as two positive numbers in order, got {values}")


def check_sizes(usual: int, sizes: tuple[int, int]) -> None:
    """Raise ValueError unless ``usual``, the detector's ``min_size``, is between ``sizes``."""
    low, high = sizes
    if not low <= usual <= high:
        raise ValueError(
            f"expected min_size of the model between the sizes of multi_scale, {low} and {high}, "
            f"got {usual}; choose another --size or --multi-scale"
        )


def draw_sizes(detector: nn.Module, sizes: tuple[int, int]) -> None:
    """Makes a detector draw the shorter side of each image in training; evaluation stays as it is.

    Args:
        detector: of :func:`~dyhead_cuda.detection.models.build`.
        sizes: the smallest and the largest shorter side, in pixels; all between are as likely. The
            detector's own ``min_size`` must be among them.

    Raises:
        ValueError: ``min_size`` is not between them.

    Source: torchvision's ``GeneralizedRCNNTransform``, which draws one of ``min_size`` in training
    and takes the last otherwise.
    """
    transform: Any = detector.transform
    usual = transform.min_size[-1]
    check_sizes(usual, sizes)
    low, high = sizes
    transform.min_size = (*(size for size in range(low, high + 1) if size != usual), usual)

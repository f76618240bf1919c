"""The interface of detection datasets, and what works with all of them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

Target = dict[str, Tensor]


class DetectionDataset(Protocol):
    """What training and evaluation need of a dataset; item i is always the same.

    An item is an image, float32 [3, H, W], RGB in 0..1, and its target: boxes float32 [n, 4] (x1,
    y1, x2, y2 in pixels), labels int64 [n] from 1, image_id int64 [], area float32 [n], iscrowd
    int64 [n], and keypoints float32 [n, K, 3] (x, y, visibility) where num_keypoints is not 0.

    Attributes:
        classes: the name of label i + 1.
        category_ids: the COCO id of label i + 1.
        coco: ground truth in COCO's format (images, annotations, categories).
        num_keypoints: K, 0 for none.

    Example:
        >>> from dyhead_cuda.detection import DetectionDataset, DigitScenes
        >>> dataset: DetectionDataset = DigitScenes("val", num_images=1, size=(64, 64))
        >>> dataset.classes[3], dataset.category_ids[3], dataset.num_keypoints
        ('3', 4, 0)
    """

    num_keypoints: int

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def category_ids(self) -> tuple[int, ...]: ...

    @property
    def coco(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Target]: ...


class Augmented(Dataset[tuple[Tensor, Target]]):
    """What datasets share whose items are changed at random, for training only.

    Args:
        dataset: any detection dataset without keypoints.
        why_not: what would be wrong with keypoints, and what to do.

    Raises:
        ValueError: a dataset with keypoints.
    """

    def __init__(self, dataset: DetectionDataset, why_not: str) -> None:
        if dataset.num_keypoints:
            raise ValueError(
                f"expected a dataset without keypoints, got one with {dataset.num_keypoints}: "
                f"{why_not}"
            )
        self.dataset = dataset
        self.classes = dataset.classes
        self.category_ids = dataset.category_ids
        self.num_keypoints = 0

    @property
    def coco(self) -> dict[str, Any]:
        """The ground truth of the original images, which are not changed."""
        return self.dataset.coco

    def __len__(self) -> int:
        return len(self.dataset)


class HorizontalFlip(Augmented):
    """A dataset whose images and boxes are mirrored at random, for training only.

    Whether an item is mirrored is drawn from torch's random state each time it is read. Not for
    classes whose mirror image is another class or none, such as digits.

    Args:
        dataset: any detection dataset without keypoints.
        probability: of the mirror image.

    Raises:
        ValueError: a dataset with keypoints, or a probability outside 0..1.

    Example:
        >>> from dyhead_cuda.detection import DigitScenes, HorizontalFlip
        >>> scenes = DigitScenes("train", num_images=1, size=(64, 64))
        >>> mirrored = HorizontalFlip(scenes, probability=1.0)
        >>> bool((mirrored[0][0] == scenes[0][0].flip(-1)).all())
        True
    """

    def __init__(self, dataset: DetectionDataset, probability: float = 0.5) -> None:
        super().__init__(dataset, "mirrored, a left elbow would be a right one; turn flipping off")
        if not 0 <= probability <= 1:
            raise ValueError(f"expected a probability of 0 to 1, got {probability}")
        self.probability = probability

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self.dataset[index]
        if float(torch.rand(())) >= self.probability:
            return image, target
        left, top, right, bottom = target["boxes"].unbind(1)
        width = image.shape[-1]
        mirrored = torch.stack((width - right, top, width - left, bottom), dim=1)
        return image.flip(-1), {**target, "boxes": mirrored}


def collate(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images and targets as two lists: the ``collate_fn`` of detection.

    Args:
        batch: items of a :class:`DetectionDataset`; images float32 [3, H, W] of any sizes.

    Returns:
        The images, and the targets in the same order.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from dyhead_cuda.detection import DigitScenes, collate
        >>> scenes = DigitScenes("val", num_images=2, size=(64, 64))
        >>> images, targets = next(iter(DataLoader(scenes, batch_size=2, collate_fn=collate)))
        >>> len(images), [int(target["image_id"]) for target in targets]
        (2, [1, 2])
    """
    return [image for image, _ in batch], [target for _, target in batch]

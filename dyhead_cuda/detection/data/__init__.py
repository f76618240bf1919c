"""Detection datasets: composed digits, and a user's own COCO-format folder."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from dyhead_cuda.detection.data.digits import DigitScenes, Split, write_coco

__all__ = ["DetectionDataset", "DigitScenes", "Split", "collate", "open_dataset", "write_coco"]

Target = dict[str, Tensor]


class DetectionDataset(Protocol):
    """What training and evaluation need of a dataset; item i is always the same.

    Attributes:
        classes: the name of label i + 1.
        category_ids: the COCO id of label i + 1.
        coco: ground truth in COCO's format (images, annotations, categories).
        num_keypoints: per object; 0 for none.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    num_keypoints: int

    @property
    def coco(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Target]: ...


def open_dataset(spec: str, split: Split, **options: Any) -> DetectionDataset:
    """The dataset "digits"; ``options`` are :class:`DigitScenes`'s."""
    if spec == "digits":
        return DigitScenes(split, **options)
    raise ValueError(f'expected "digits", got {spec!r}')


def collate(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images (of any sizes) and targets as two lists."""
    return [image for image, _ in batch], [target for _, target in batch]

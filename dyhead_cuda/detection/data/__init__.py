"""Detection datasets: composed digits, and a user's own COCO-format folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyhead_cuda.detection.data.base import DetectionDataset, HorizontalFlip, Target, collate
from dyhead_cuda.detection.data.coco import CocoFolder
from dyhead_cuda.detection.data.digits import DigitScenes, Split, write_coco

__all__ = [
    "CocoFolder",
    "DetectionDataset",
    "DigitScenes",
    "HorizontalFlip",
    "Split",
    "Target",
    "collate",
    "open_dataset",
    "write_coco",
]


def open_dataset(spec: str | Path, split: Split, **options: Any) -> DetectionDataset:
    """A dataset by name.

    Args:
        spec: "digits", or a folder in COCO's format.
        split: "train" or "val".
        options: :class:`DigitScenes`'s or :class:`CocoFolder`'s.

    Raises:
        ValueError: neither; or what the dataset raises.
    """
    if spec == "digits":
        return DigitScenes(split, **options)
    if not Path(spec).is_dir():
        raise ValueError(f'expected "digits" or a folder in COCO\'s format, got {str(spec)!r}')
    return CocoFolder(spec, split, **options)

"""Datasets by name, and the data of a run as settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyhead_cuda import checks
from dyhead_cuda.detection.data.base import DetectionDataset, HorizontalFlip
from dyhead_cuda.detection.data.coco import CocoFolder
from dyhead_cuda.detection.data.cutouts import CutoutScenes
from dyhead_cuda.detection.data.digits import DigitScenes
from dyhead_cuda.detection.names import SPLITS, Split
from dyhead_cuda.detection.settings import Settings


def open_dataset(spec: str | Path, split: Split, **options: Any) -> DetectionDataset:
    """A dataset by name.

    Args:
        spec: "digits"; "cutouts", whose option ``path`` is a folder of transparent pictures; or
            a folder in COCO's format.
        split: "train" or "val".
        options: :class:`DigitScenes`'s, :class:`CutoutScenes`'s or :class:`CocoFolder`'s.

    Returns:
        A :class:`DigitScenes`, a :class:`CutoutScenes` or a :class:`CocoFolder`.

    Raises:
        ValueError: another spec; or what the dataset raises.

    Example:
        >>> from dyhead_cuda.detection import open_dataset
        >>> len(open_dataset("digits", "val", num_images=3))
        3
    """
    if spec == "digits":
        return DigitScenes(split, **options)
    if spec == "cutouts" and "path" in options:
        return CutoutScenes(split=split, **options)
    if not Path(spec).is_dir():
        raise ValueError(
            f'expected "digits", "cutouts" with the option path, or a folder in COCO\'s format, '
            f"got {str(spec)!r}"
        )
    return CocoFolder(spec, split, **options)


@dataclass(frozen=True)
class DataConfig(Settings):
    """The data sets of a run; JSON-able.

    Args:
        spec: "digits", "cutouts" or a folder, for :func:`dyhead_cuda.detection.data.open_dataset`.
        options: its options, for both splits.
        train, val: more options for one split.
        flip: mirror half of the training images, at random.

    Example:
        >>> from dyhead_cuda.detection import DataConfig
        >>> data = DataConfig("digits", {"size": [64, 64]}, train={"num_images": 5})
        >>> len(data.open("train")), len(data.open("val"))
        (5, 400)
        >>> DataConfig.from_dict(data.to_dict()) == data
        True
    """

    spec: str
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Any] = field(default_factory=dict)
    flip: bool = False

    def open(self, split: Split) -> DetectionDataset:
        """The data set of one split.

        Args:
            split: "train" or "val".

        Returns:
            The dataset; :class:`HorizontalFlip` of it for training with ``flip``.

        Raises:
            ValueError: another split, or data that cannot be read or mirrored.
        """
        checks.one_of("split", split, SPLITS)
        dataset = open_dataset(self.spec, split, **self.options, **getattr(self, split))
        return HorizontalFlip(dataset) if self.flip and split == "train" else dataset

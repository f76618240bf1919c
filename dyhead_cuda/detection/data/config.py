"""Datasets by name, and the data of a run as settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyhead_cuda import checks
from dyhead_cuda.detection.data.augment import ScaleJitter, check_range
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
        scale_jitter, jitter_size: scales and size of :class:`ScaleJitter` of the training images;
            None: none. The size is ``min_size`` of the model.
        multi_scale: the smallest and the largest shorter side of training images, in pixels: the
            detector draws one for each and resizes the image to it, in place of its ``min_size``,
            which must be between them. None: all have ``min_size``.

    Raises:
        ValueError: only one of ``scale_jitter`` and ``jitter_size``, both ``scale_jitter`` and
            ``multi_scale``, or values out of range.

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
    scale_jitter: tuple[float, float] | None = None
    jitter_size: int | None = None
    multi_scale: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("scale_jitter", "multi_scale"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, tuple(values))  # JSON has lists
                check_range(name, getattr(self, name))
        if not all(isinstance(size, int) for size in self.multi_scale or ()):
            raise ValueError(f"expected multi_scale in whole pixels, got {self.multi_scale}")
        if (self.scale_jitter is None) != (self.jitter_size is None):
            raise ValueError(
                "expected both scale_jitter and jitter_size or none of them, got "
                f"{self.scale_jitter} and {self.jitter_size}"
            )
        if self.scale_jitter is not None and self.multi_scale is not None:
            raise ValueError(
                "expected scale_jitter or multi_scale, got both: images of drawn scales would be "
                "resized once more"
            )

    def open(self, split: Split) -> DetectionDataset:
        """The data set of one split.

        Args:
            split: "train" or "val".

        Returns:
            The dataset; for training with ``scale_jitter`` and ``flip`` a :class:`ScaleJitter` and
            a :class:`HorizontalFlip` of it.

        Raises:
            ValueError: another split, or data that cannot be read, scaled or mirrored.
        """
        checks.one_of("split", split, SPLITS)
        dataset = open_dataset(self.spec, split, **self.options, **getattr(self, split))
        if split == "train" and self.scale_jitter is not None and self.jitter_size is not None:
            dataset = ScaleJitter(dataset, self.jitter_size, self.scale_jitter)
        return HorizontalFlip(dataset) if self.flip and split == "train" else dataset

"""Detection datasets: composed scenes, and a user's own COCO-format folder."""

from dyhead_cuda.detection.data.augment import ScaleJitter, check_sizes, draw_sizes
from dyhead_cuda.detection.data.base import DetectionDataset, HorizontalFlip, Target, collate
from dyhead_cuda.detection.data.coco import CocoFolder
from dyhead_cuda.detection.data.composed import ComposedScenes, write_coco
from dyhead_cuda.detection.data.config import DataConfig, open_dataset
from dyhead_cuda.detection.data.cutouts import CutoutScenes
from dyhead_cuda.detection.data.digits import DigitScenes

__all__ = [
    "CocoFolder",
    "ComposedScenes",
    "CutoutScenes",
    "DataConfig",
    "DetectionDataset",
    "DigitScenes",
    "HorizontalFlip",
    "ScaleJitter",
    "Target",
    "check_sizes",
    "collate",
    "draw_sizes",
    "open_dataset",
    "write_coco",
]

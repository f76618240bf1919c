"""Detection datasets: composed digits, and a user's own COCO-format folder."""

from dyhead_cuda.detection.data.augment import ScaleJitter, check_sizes, draw_sizes
from dyhead_cuda.detection.data.base import DetectionDataset, HorizontalFlip, Target, collate
from dyhead_cuda.detection.data.coco import CocoFolder
from dyhead_cuda.detection.data.config import DataConfig, open_dataset
from dyhead_cuda.detection.data.digits import DigitScenes, write_coco

__all__ = [
    "CocoFolder",
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

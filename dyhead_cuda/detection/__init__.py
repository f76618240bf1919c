"""Detectors with a Dynamic Head on torchvision: models, data, training, evaluation, pictures.

Everything speaks torchvision's language. An image is a float tensor [3, H, W], RGB in 0..1. A
target is a dict with boxes, float32 [n, 4] (x1, y1, x2, y2 in pixels), labels, int64 [n] in
1..num_classes (0 is background), image_id, int64 [], and where there are any also area [n], iscrowd
[n] and keypoints, float32 [n, K, 3] (x, y, visible). A detector in training maps lists of images
and targets to a dict of losses, and in evaluation images to a list of dicts with boxes, scores,
labels and maybe keypoints.

Needs ``pip install 'dyhead_cuda[detection]'``.
"""

from typing import TYPE_CHECKING

from dyhead_cuda.detection.lazy import attribute_of

if TYPE_CHECKING:
    from dyhead_cuda.detection.data import (
        CocoFolder,
        ComposedScenes,
        CutoutScenes,
        DataConfig,
        DetectionDataset,
        DigitScenes,
        HorizontalFlip,
        ScaleJitter,
        collate,
        open_dataset,
        write_coco,
    )
    from dyhead_cuda.detection.evaluation import Metrics, evaluate, score
    from dyhead_cuda.detection.models import (
        ATSS,
        FCOS,
        MICROSOFT_R50,
        MICROSOFT_SWINT,
        MMDET_R50,
        MMDET_R50_CAFFE,
        MMDET_SWINL,
        FasterRCNN,
        ModelConfig,
        Pyramid,
        Recipe,
        RetinaNet,
        Start,
        atss_from_microsoft,
        atss_from_mmdet,
        build,
        read_start,
    )
    from dyhead_cuda.detection.statistics import positives_per_level
    from dyhead_cuda.detection.training import TrainConfig, load_model, train
    from dyhead_cuda.detection.tta import TestTimeAugmentation

__getattr__ = attribute_of(
    __name__,
    {
        "data": (
            "CocoFolder",
            "ComposedScenes",
            "CutoutScenes",
            "DataConfig",
            "DetectionDataset",
            "DigitScenes",
            "HorizontalFlip",
            "ScaleJitter",
            "collate",
            "open_dataset",
            "write_coco",
        ),
        "evaluation": (
            "Metrics",
            "evaluate",
            "score",
        ),
        "models": (
            "ATSS",
            "FCOS",
            "MICROSOFT_R50",
            "MICROSOFT_SWINT",
            "MMDET_R50",
            "MMDET_R50_CAFFE",
            "MMDET_SWINL",
            "FasterRCNN",
            "ModelConfig",
            "Pyramid",
            "Recipe",
            "RetinaNet",
            "Start",
            "atss_from_microsoft",
            "atss_from_mmdet",
            "build",
            "read_start",
        ),
        "statistics": ("positives_per_level",),
        "tta": ("TestTimeAugmentation",),
        "training": (
            "TrainConfig",
            "load_model",
            "train",
        ),
    },
)

__all__ = [
    "ATSS",
    "FCOS",
    "MICROSOFT_R50",
    "MICROSOFT_SWINT",
    "MMDET_R50",
    "MMDET_R50_CAFFE",
    "MMDET_SWINL",
    "CocoFolder",
    "ComposedScenes",
    "CutoutScenes",
    "DataConfig",
    "DetectionDataset",
    "DigitScenes",
    "FasterRCNN",
    "HorizontalFlip",
    "Metrics",
    "ModelConfig",
    "Pyramid",
    "Recipe",
    "RetinaNet",
    "ScaleJitter",
    "Start",
    "TestTimeAugmentation",
    "TrainConfig",
    "atss_from_microsoft",
    "atss_from_mmdet",
    "build",
    "collate",
    "evaluate",
    "load_model",
    "open_dataset",
    "positives_per_level",
    "read_start",
    "score",
    "train",
    "write_coco",
]

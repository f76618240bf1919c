"""Detectors with a Dynamic Head on torchvision: models, data, training, evaluation, pictures.

Everything speaks torchvision's language. An image is a float tensor [3, H, W], RGB in 0..1. A
target is a dict with boxes, float32 [n, 4] (x1, y1, x2, y2 in pixels), labels, int64 [n] in
1..num_classes (0 is background), image_id, int64 [], and where there are any also area [n], iscrowd
[n] and keypoints, float32 [n, K, 3] (x, y, visible). A detector in training maps lists of images
and targets to a dict of losses, and in evaluation images to a list of dicts with boxes, scores,
labels and maybe keypoints.

Needs ``pip install 'dyhead_cuda[detection]'``.
"""

from dyhead_cuda.detection.data import CocoFolder, DigitScenes, collate, open_dataset, write_coco
from dyhead_cuda.detection.evaluation import Metrics, evaluate
from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.backbones import Pyramid
from dyhead_cuda.detection.models.checkpoints import atss_from_microsoft, atss_from_mmdet
from dyhead_cuda.detection.models.config import ModelConfig, build
from dyhead_cuda.detection.models.one_stage import FCOS, RetinaNet
from dyhead_cuda.detection.models.two_stage import FasterRCNN
from dyhead_cuda.detection.training.recipe import DataConfig, TrainConfig
from dyhead_cuda.detection.training.trainer import load_model, train

__all__ = [
    "ATSS",
    "FCOS",
    "CocoFolder",
    "DataConfig",
    "DigitScenes",
    "FasterRCNN",
    "Metrics",
    "ModelConfig",
    "Pyramid",
    "RetinaNet",
    "TrainConfig",
    "atss_from_microsoft",
    "atss_from_mmdet",
    "build",
    "collate",
    "evaluate",
    "load_model",
    "open_dataset",
    "train",
    "write_coco",
]

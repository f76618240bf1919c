"""Detectors: backbone and pyramid, Dynamic Head, predictors, and their published checkpoints."""

from typing import TYPE_CHECKING

from dyhead_cuda.detection.lazy import attribute_of

if TYPE_CHECKING:
    from dyhead_cuda.detection.models.atss import ATSS
    from dyhead_cuda.detection.models.backbones import Pyramid
    from dyhead_cuda.detection.models.checkpoints import atss_from_microsoft, atss_from_mmdet
    from dyhead_cuda.detection.models.config import (
        ModelConfig,
        build,
        build_empty,
        count_parameters,
        gflops,
    )
    from dyhead_cuda.detection.models.one_stage import FCOS, RetinaNet
    from dyhead_cuda.detection.models.recipes import (
        MICROSOFT_R50,
        MICROSOFT_SWINT,
        MMDET_R50,
        MMDET_R50_CAFFE,
        MMDET_SWINL,
        Recipe,
    )
    from dyhead_cuda.detection.models.starting import Start, read_start
    from dyhead_cuda.detection.models.two_stage import FasterRCNN

__getattr__ = attribute_of(
    __name__,
    {
        "atss": ("ATSS",),
        "backbones": ("Pyramid",),
        "checkpoints": (
            "atss_from_microsoft",
            "atss_from_mmdet",
        ),
        "config": (
            "ModelConfig",
            "build",
            "build_empty",
            "count_parameters",
            "gflops",
        ),
        "one_stage": (
            "FCOS",
            "RetinaNet",
        ),
        "recipes": (
            "MICROSOFT_R50",
            "MICROSOFT_SWINT",
            "MMDET_R50",
            "MMDET_R50_CAFFE",
            "MMDET_SWINL",
            "Recipe",
        ),
        "starting": ("Start", "read_start"),
        "two_stage": ("FasterRCNN",),
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
    "FasterRCNN",
    "ModelConfig",
    "Pyramid",
    "Recipe",
    "RetinaNet",
    "Start",
    "atss_from_microsoft",
    "atss_from_mmdet",
    "build",
    "build_empty",
    "count_parameters",
    "gflops",
    "read_start",
]

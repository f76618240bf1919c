"""RetinaNet and FCOS of torchvision on any pyramid, with towers of any length."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.fcos import (
    FCOSClassificationHead,
    FCOSHead,
    FCOSRegressionHead,
)
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import Conv2dNormActivation

from dyhead_cuda import checks
from dyhead_cuda.detection.models.adapters import CheckedDetector, PyramidAnchors, Target, widen

ANCHOR_SCALES = tuple(4 * 2 ** (octave / 3) for octave in range(3))  # in strides
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
SCORE_THRESHOLD = 0.05
DETECTIONS = 100


class _LabelsFromOne(CheckedDetector):
    """Labels 1..num_classes outside, 0..num_classes - 1 inside: no predictor of the background."""

    def compute_loss(self, targets: list[Target], *arguments: Any) -> dict[str, Tensor]:
        shifted = [{**target, "labels": target["labels"] - 1} for target in targets]
        torchvision_s: Any = super()
        return torchvision_s.compute_loss(shifted, *arguments)

    def postprocess_detections(self, *arguments: Any) -> list[dict[str, Tensor]]:
        torchvision_s: Any = super()
        found = torchvision_s.postprocess_detections(*arguments)
        return [{**detections, "labels": detections["labels"] + 1} for detections in found]


class RetinaNet(_LabelsFromOne, detection.RetinaNet):
    """RetinaNet: nine anchors at each position, of 4 to 6.3 strides and three ratios.

    Args:
        backbone: with ``out_channels`` and ``strides``, as
            :class:`~dyhead_cuda.detection.models.backbones.Pyramid`.
        num_classes: without background.
        min_size, max_size: pixels, see :class:`~dyhead_cuda.detection.models.config.ModelConfig`.
        convs: 3x3 convolutions with ReLU before each predictor.

    The interface is torchvision's, with labels from 1; at most 100 detections with scores above
    0.05 are returned for an image.

    Raises:
        ValueError: images or targets that do not fit, before anything runs.

    Source: arXiv 1708.02002.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        convs: int = 4,
    ) -> None:
        checks.positive(num_classes=num_classes)
        pyramid: Any = backbone
        anchors = PyramidAnchors(pyramid.strides, ANCHOR_SCALES, ANCHOR_RATIOS)
        channels, per_position = pyramid.out_channels, len(ANCHOR_SCALES) * len(ANCHOR_RATIOS)
        head = RetinaNetHead(channels, per_position, num_classes)
        for branch in (head.classification_head, head.regression_head):
            branch.conv = _plain_tower(channels, convs)
        super().__init__(
            backbone,
            num_classes,
            min_size,
            max_size,
            anchor_generator=anchors,
            head=widen(head),
            score_thresh=SCORE_THRESHOLD,
            detections_per_img=DETECTIONS,
        )
        self.num_classes = num_classes


class FCOS(_LabelsFromOne, detection.FCOS):
    """FCOS: boxes from points, each level for sizes of 4 to 8 strides (any, at the two ends).

    Args: see :class:`RetinaNet`; the convolutions of the towers have group normalisation. The
    least score is 0.05 (of sqrt(class probability * centerness); torchvision's default is 0.2).

    Source: arXiv 1904.01355, arXiv 2006.09214.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        convs: int = 4,
    ) -> None:
        checks.positive(num_classes=num_classes)
        pyramid: Any = backbone
        channels = pyramid.out_channels
        # 32 groups as published, fewer for few channels: on a map of one pixel, group normalisation
        # needs at least two channels in each group.
        norm = partial(nn.GroupNorm, math.gcd(32, channels, channels // 2))
        head = FCOSHead(channels, 1, num_classes, num_convs=0)
        head.classification_head = FCOSClassificationHead(
            channels, 1, num_classes, convs, norm_layer=norm
        )
        head.regression_head = FCOSRegressionHead(channels, 1, convs, norm_layer=norm)
        super().__init__(
            backbone,
            num_classes,
            min_size,
            max_size,
            anchor_generator=PyramidAnchors(pyramid.strides, (1,)),
            head=widen(head),
            score_thresh=SCORE_THRESHOLD,
            detections_per_img=DETECTIONS,
        )
        self.num_classes = num_classes


def _plain_tower(channels: int, convs: int) -> nn.Sequential:
    tower = nn.Sequential(
        *(Conv2dNormActivation(channels, channels, norm_layer=None) for _ in range(convs))
    )
    for name, parameter in tower.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=0.01)
        else:
            nn.init.zeros_(parameter)
    return tower

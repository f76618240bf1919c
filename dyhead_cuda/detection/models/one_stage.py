"""RetinaNet and FCOS of torchvision on any pyramid, with towers of any length."""

from __future__ import annotations

import math
import sys
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
from dyhead_cuda.detection.models.adapters import (
    CheckedDetector,
    PyramidAnchors,
    Target,
    anchor_side,
    has_area,
    pixels_of,
    widen,
)

ANCHOR_SCALE = 4  # side of the smallest anchor in strides
OCTAVES = tuple(2 ** (octave / 3) for octave in range(3))
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
SCORE_THRESHOLD = 0.05
DETECTIONS = 100


class _LabelsFromOne(CheckedDetector):
    """Mixin: labels are 1..num_classes for users, 0..num_classes - 1 inside torchvision."""

    def compute_loss(self, targets: list[Target], *arguments: Any) -> dict[str, Tensor]:
        shifted = [{**target, "labels": target["labels"] - 1} for target in targets]
        torchvision_s: Any = super()
        return torchvision_s.compute_loss(shifted, *arguments)

    def postprocess_detections(self, *arguments: Any) -> list[dict[str, Tensor]]:
        torchvision_s: Any = super()
        found = torchvision_s.postprocess_detections(*arguments)
        return [{**detections, "labels": detections["labels"] + 1} for detections in found]


class RetinaNet(_LabelsFromOne, detection.RetinaNet):
    """RetinaNet: nine anchors at each position, of three sizes within an octave and three ratios.

    The interface is torchvision's, with labels from 1; at most 100 detections with scores above
    0.05 are returned for an image.

    Args:
        backbone: maps [N, 3, H, W] to a dict of levels [N, C, H_l, W_l], finest first, and has
            ``out_channels`` (C) and ``strides`` (pixels), as :class:`Pyramid`. Images are
            normalised with its ``image_mean`` and ``image_std``, or ImageNet's usual ones where it
            has none.
        num_classes: without background.
        min_size, max_size: pixels; the shorter side is resized to ``min_size`` unless the longer
            one would exceed ``max_size``.
        convs: 3x3 convolutions with ReLU before each predictor.
        anchor_scale: side of the smallest anchors, in strides, of which the others have 1.26 and
            1.59 times; None for the published 4.

    Raises:
        ValueError: ``num_classes`` below 1, an ``anchor_scale`` that is not positive.

    Source: arXiv 1708.02002; torchvision ``RetinaNet``.

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import Pyramid, RetinaNet
        >>> pyramid = Pyramid("timm/test_resnet.r160_in1k", channels=16, blocks=1, last_level=5)
        >>> model = RetinaNet(pyramid, num_classes=3, min_size=64, max_size=64)
        >>> images = [torch.rand(3, 64, 64)]
        >>> boxes, labels = torch.tensor([[8.0, 8.0, 40.0, 48.0]]), torch.tensor([2])
        >>> sorted(model(images, [{"boxes": boxes, "labels": labels}]))
        ['bbox_regression', 'classification']
        >>> (found,) = model.eval()(images)
        >>> sorted(found)
        ['boxes', 'labels', 'scores']
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        convs: int = 4,
        anchor_scale: float | None = None,
    ) -> None:
        checks.positive(num_classes=num_classes)
        pyramid: Any = backbone
        side = anchor_side(anchor_scale, ANCHOR_SCALE)
        sides = [side * octave for octave in OCTAVES]
        anchors = PyramidAnchors(pyramid.strides, sides, ANCHOR_RATIOS)
        channels, per_position = pyramid.out_channels, len(OCTAVES) * len(ANCHOR_RATIOS)
        head = RetinaNetHead(channels, per_position, num_classes)
        for branch in (head.classification_head, head.regression_head):
            branch.conv = _plain_tower(channels, convs)
        super().__init__(
            backbone,
            num_classes,
            min_size,
            max_size,
            *pixels_of(backbone),
            anchor_generator=anchors,
            head=widen(head),
            score_thresh=SCORE_THRESHOLD,
            detections_per_img=DETECTIONS,
        )
        self.num_classes = num_classes


class FCOS(_LabelsFromOne, detection.FCOS):
    """FCOS: boxes from points, each level for sizes of 4 to 8 strides (any, at the two ends).

    The interface is torchvision's, with labels from 1; at most 100 detections with scores above
    0.05 are returned for an image. A score is sqrt(class probability * centerness).

    Args:
        backbone: maps [N, 3, H, W] to a dict of levels [N, C, H_l, W_l], finest first, and has
            ``out_channels`` (C) and ``strides`` (pixels), as :class:`Pyramid`. Images are
            normalised with its ``image_mean`` and ``image_std``, or ImageNet's usual ones where it
            has none.
        num_classes: without background.
        min_size, max_size: pixels; the shorter side is resized to ``min_size`` unless the longer
            one would exceed ``max_size``.
        convs: 3x3 convolutions with group normalisation and ReLU before each predictor.

    Raises:
        ValueError: ``num_classes`` below 1.

    Source: arXiv 1904.01355, arXiv 2006.09214; torchvision ``FCOS``, whose minimum score is 0.2.

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import FCOS, Pyramid
        >>> pyramid = Pyramid("timm/test_resnet.r160_in1k", channels=16, blocks=1, last_level=5)
        >>> model = FCOS(pyramid, num_classes=3, min_size=64, max_size=64)
        >>> images = [torch.rand(3, 64, 64)]
        >>> boxes, labels = torch.tensor([[8.0, 8.0, 40.0, 48.0]]), torch.tensor([2])
        >>> sorted(model(images, [{"boxes": boxes, "labels": labels}]))
        ['bbox_ctrness', 'bbox_regression', 'classification']
        >>> (found,) = model.eval()(images)
        >>> sorted(found)
        ['boxes', 'labels', 'scores']
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
            *pixels_of(backbone),
            anchor_generator=PyramidAnchors(pyramid.strides, (1,)),
            head=widen(head),
            score_thresh=SCORE_THRESHOLD,
            detections_per_img=DETECTIONS,
        )
        self.num_classes = num_classes

    def postprocess_detections(self, *arguments: Any) -> list[dict[str, Tensor]]:
        # Distances of 0 make a box without area. It suppresses none and none suppresses it, but it
        # must not take the place of another among the best.
        detector: Any = self
        most = detector.detections_per_img
        detector.detections_per_img = sys.maxsize
        try:
            every = super().postprocess_detections(*arguments)
        finally:
            detector.detections_per_img = most
        return [
            {name: values[has_area(found["boxes"])][:most] for name, values in found.items()}
            for found in every
        ]


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

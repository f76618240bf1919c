"""Faster R-CNN with the Dynamic Head on the pyramid, with its task attention as the box head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from dyhead_cuda import checks
from dyhead_cuda.detection.models.adapters import (
    CheckedDetector,
    PyramidAnchors,
    anchor_side,
    pixels_of,
    widen,
)
from dyhead_cuda.detection.names import BoxHead
from dyhead_cuda.modules import DynamicReLU

ANCHOR_SCALE = 8  # in strides
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
BOX_SIDE, KEYPOINT_SIDE = 7, 14  # of pooled regions
POOLED_STRIDES = 32  # levels up to this stride are pooled from
KEYPOINT_CONVS = 8


class FasterRCNN(CheckedDetector, detection.FasterRCNN):
    """Faster R-CNN on a pyramid, with a choice of what follows RoI pooling.

    Proposals come from all levels, regions of 7x7 are pooled from those of stride 32 and less.

    The interface is torchvision's, with labels from 1; with keypoints, targets and results have
    "keypoints" [n, K, 3] (x, y, visible).

    Args:
        backbone: maps [N, 3, H, W] to a dict of levels [N, C, H_l, W_l], finest first, and has
            ``out_channels`` (C) and ``strides`` (pixels), as :class:`Pyramid`. Images are
            normalised with its ``image_mean`` and ``image_std``, or ImageNet's usual ones where it
            has none.
        num_classes: without background.
        min_size, max_size: pixels; the shorter side is resized to ``min_size`` unless the longer
            one would exceed ``max_size``.
        box_head: what is between the pooled regions [R, C, 7, 7] and the linear predictors.
            "mlp": two fully connected layers of 4 C values (1024 for 256 channels, as
            torchvision). "task": the task attention, one dynamic ReLU whose coefficients come from
            the mean of the region, in their place, as in the paper's figure; more of them in a row
            would still be a function of one channel and that mean, so there is one for any number
            of blocks. "linear": nothing. After the last two the predictors see all 49 C
            values, as the box's sides need to know where in the region things are.
        keypoints: K, of each object; 0 for no keypoint head. Its eight convolutions have
            2 C channels (512 for 256, as torchvision).
        anchor_scale: side of the anchors of the proposals, in strides; None for the published 8.

    Raises:
        ValueError: ``num_classes`` below 1, an unknown ``box_head``, an ``anchor_scale`` that is
            not positive, or a pyramid without levels to
            pool from.

    Source: arXiv 1506.01497, arXiv 1612.03144; arXiv 2106.08322, figure 4b; arXiv 1703.06870
    (keypoints); torchvision ``FasterRCNN``.

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import FasterRCNN, Pyramid
        >>> pyramid = Pyramid("timm/test_resnet.r160_in1k", channels=16, blocks=1, last_level=5)
        >>> model = FasterRCNN(pyramid, num_classes=3, min_size=64, max_size=64, box_head="task")
        >>> images = [torch.rand(3, 64, 64)]
        >>> boxes, labels = torch.tensor([[8.0, 8.0, 40.0, 48.0]]), torch.tensor([2])
        >>> sorted(model(images, [{"boxes": boxes, "labels": labels}]))
        ['loss_box_reg', 'loss_classifier', 'loss_objectness', 'loss_rpn_box_reg']
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
        box_head: BoxHead = "mlp",
        keypoints: int = 0,
        anchor_scale: float | None = None,
    ) -> None:
        checks.positive(num_classes=num_classes)
        pyramid: Any = backbone
        channels, strides = pyramid.out_channels, pyramid.strides
        pooled_values = channels * BOX_SIDE**2
        side = anchor_side(anchor_scale, ANCHOR_SCALE)
        head, values = _make_box_head(box_head, channels, pooled_values)
        mean, std = pixels_of(backbone)
        super().__init__(
            backbone,
            min_size=min_size,
            max_size=max_size,
            image_mean=mean,
            image_std=std,
            rpn_anchor_generator=PyramidAnchors(strides, (side,), ANCHOR_RATIOS),
            rpn_head=widen(RPNHead(channels, len(ANCHOR_RATIOS))),
            box_roi_pool=_make_pooling(strides, BOX_SIDE),
            box_head=head,
            box_predictor=widen(FastRCNNPredictor(values, num_classes + 1)),
        )
        self.num_classes, self.num_keypoints = num_classes, keypoints
        if keypoints:
            width = 2 * channels
            heads: Any = self.roi_heads
            heads.keypoint_roi_pool = _make_pooling(strides, KEYPOINT_SIDE)
            heads.keypoint_head = KeypointRCNNHeads(channels, (width,) * KEYPOINT_CONVS)
            heads.keypoint_predictor = widen(KeypointRCNNPredictor(width, keypoints))


def _make_box_head(kind: BoxHead, channels: int, pooled_values: int) -> tuple[nn.Module, int]:
    """The module from pooled regions to rows for the predictors, and the length of a row."""
    checks.one_of("box_head", kind, get_args(BoxHead))
    if kind == "mlp":
        return TwoMLPHead(pooled_values, 4 * channels), 4 * channels
    attention = {"task": [DynamicReLU(channels)], "linear": []}[kind]
    return nn.Sequential(*attention, nn.Flatten()), pooled_values


def _make_pooling(strides: Sequence[int], side: int) -> MultiScaleRoIAlign:
    pooled = [stride for stride in strides if stride <= POOLED_STRIDES]
    if not pooled:
        raise ValueError(
            f"expected a pyramid with levels of stride {POOLED_STRIDES} or less to pool regions "
            f"from, got strides {tuple(strides)}"
        )
    pooling = MultiScaleRoIAlign([str(i) for i in range(len(pooled))], side, sampling_ratio=2)
    # torchvision infers these from the sizes of the first batch, wrongly for small images.
    pooling.scales = [1 / stride for stride in pooled]
    pooling.map_levels = LevelMapper(pooled[0].bit_length() - 1, pooled[-1].bit_length() - 1)
    return pooling

"""ATSS: a one-stage detector with one anchor per position, the paper's main one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import (
    batched_nms,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from dyhead_cuda import checks
from dyhead_cuda.detection.models.adapters import (
    PyramidAnchors,
    anchor_side,
    check_images,
    check_targets,
    has_area,
    pixels_of,
)
from dyhead_cuda.detection.models.atss_assigner import assign, centers, margins
from dyhead_cuda.detection.names import Postprocess

Target = dict[str, Any]

ANCHOR_SCALE = 8  # side of an anchor in strides
_BOX_WEIGHT = 2.0
_PRIOR = 0.01


class Predictions(NamedTuple):
    """The head's raw outputs for each anchor, float32, one tensor per level."""

    logits: list[Tensor]  # [N, A_l, num_classes]
    deltas: list[Tensor]  # [N, A_l, 4]
    centerness: list[Tensor]  # [N, A_l], logits


def _flatten(maps: Tensor) -> Tensor:
    """[N, C, H, W] to float32 [N, H * W, C]."""
    return maps.flatten(2).transpose(1, 2).float()


class ATSSHead(nn.Module):
    """Towers and predictors, shared by all levels; see :class:`ATSS` for the arguments.

    ``forward`` takes the levels [N, C, H_l, W_l], finest first, and returns :class:`Predictions`.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_levels: int,
        convs: int,
        kernel_size: int,
        shared_tower: bool,
    ) -> None:
        super().__init__()

        def tower(convs: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    nn.Sequential(
                        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                        nn.GroupNorm(math.gcd(32, channels, channels // 2), channels),
                        nn.ReLU(inplace=True),
                    )
                    for _ in range(convs)
                )
            )

        def predictor(values: int) -> nn.Conv2d:
            return nn.Conv2d(channels, values, kernel_size, padding=kernel_size // 2)

        shared, own = (convs, 0) if shared_tower else (0, convs)
        self.tower, self.cls_tower, self.box_tower = tower(shared), tower(own), tower(own)
        self.classes, self.boxes, self.centerness = (
            predictor(num_classes),
            predictor(4),
            predictor(1),
        )
        self.scales = nn.Parameter(torch.ones(num_levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.classes.bias is not None
        nn.init.constant_(self.classes.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, features: Sequence[Tensor]) -> Predictions:
        predictions = Predictions([], [], [])
        for feature, scale in zip(features, self.scales, strict=True):
            shared = self.tower(feature)
            box_features = self.box_tower(shared)
            predictions.logits.append(_flatten(self.classes(self.cls_tower(shared))))
            predictions.deltas.append(_flatten(self.boxes(box_features)) * scale)
            predictions.centerness.append(_flatten(self.centerness(box_features))[..., 0])
        return predictions


def _mean_over_ranks(value: Tensor) -> Tensor:
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value / distributed.get_world_size()


def _clip(
    boxes: Tensor, scores: Tensor, kinds: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes clipped to the image; those without any area left are dropped."""
    boxes = clip_boxes_to_image(boxes, size)
    keep = has_area(boxes)
    return boxes[keep], scores[keep], kinds[keep]


class ATSS(nn.Module):
    """Adaptive training sample selection on a pyramid, as mmdet and microsoft/DynamicHead have it.

    One square anchor at each position; focal, GIoU (weight 2, weighted by the centerness targets)
    and centerness losses; scores are class probability times centerness.

    The losses are divided by the number of positive anchors, at least 1 per image, and the sum of
    centerness targets, at least 1; both averaged over the ranks where torch.distributed runs.
    Anchors over the padding are background, as in microsoft/DynamicHead (mmdet leaves those out
    that lie beyond an image's own multiple of the padding).

    Args:
        backbone: maps [N, 3, H, W] to a dict of levels [N, C, H_l, W_l], finest first, and has
            ``out_channels`` (C) and ``strides`` (one int per level, pixels), as
            :class:`Pyramid`.
        num_classes: without the background.
        min_size, max_size: pixels; the shorter side is resized to ``min_size`` unless the longer
            one would exceed ``max_size``; see torchvision's ``GeneralizedRCNNTransform``.
        convs: 3x3 convolutions with group normalisation and ReLU before the predictors; 0 as
            published with a Dynamic Head, 4 without.
        shared_tower: one tower of ``convs`` convolutions for classes and boxes, as a Dynamic Head
            is one for both, instead of one for each; not published.
        anchor_scale: side of the anchors, in strides; None for the published 8. Smaller ones suit
            scenes whose objects are small for the strides of the pyramid.
        kernel_size: of the predictors; 3 in mmdet's reproduction with ResNet-50 and in plain ATSS,
            1 in microsoft/DynamicHead. From random weights, 3 learns much faster.
        center_offset: strides; an anchor's centre is (x + center_offset, y + center_offset): 0.5
            in microsoft/DynamicHead and mmdet's reproduction of it, 0 in mmdet's other configs.
        postprocess: "mmdet" ranks the candidates of a level by class probability and clips boxes
            before non-maximum suppression, "microsoft" ranks by the score and clips afterwards.
        image_mean, image_std: three values, of RGB in 0..1. None: the attributes of that name of
            the backbone, or ImageNet's usual ones where it has none.
        size_divisible: pixels; images are padded at the right and bottom to multiples of it.
        score_threshold: minimum class probability of a candidate.
        candidates: kept on each level of an image before non-maximum suppression.
        nms_threshold: a box is dropped for a better one of its class with a greater IoU.
        detections: kept in each image.
        topk: candidates of an object on each level; see
            :func:`~dyhead_cuda.detection.models.atss_assigner.assign`.

    Raises:
        ValueError: ``num_classes`` or ``topk`` below 1, an unknown ``postprocess``, an
            ``anchor_scale`` that is not positive.

    Source: arXiv 1912.02424; mmdet ``ATSSHead``; microsoft/DynamicHead ``extra/atss.py``.

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import ATSS, Pyramid
        >>> pyramid = Pyramid("timm/test_resnet.r160_in1k", channels=16, blocks=1, last_level=5)
        >>> model = ATSS(pyramid, num_classes=3, min_size=64, max_size=64)
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
        convs: int = 0,
        shared_tower: bool = False,
        anchor_scale: float | None = None,
        kernel_size: int = 3,
        center_offset: float = 0.5,
        postprocess: Postprocess = "mmdet",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        size_divisible: int = 32,
        score_threshold: float = 0.05,
        candidates: int = 1000,
        nms_threshold: float = 0.6,
        detections: int = 100,
        topk: int = 9,
    ) -> None:
        super().__init__()
        checks.positive(num_classes=num_classes, topk=topk)
        checks.one_of("postprocess", postprocess, get_args(Postprocess))
        self.backbone = backbone
        strides = tuple(cast(Sequence[int], backbone.strides))
        self.num_classes, self.topk = num_classes, topk
        self.postprocess = postprocess
        self.score_threshold, self.candidates = score_threshold, candidates
        self.nms_threshold, self.detections = nms_threshold, detections
        channels = cast(int, backbone.out_channels)
        self.head = ATSSHead(channels, num_classes, len(strides), convs, kernel_size, shared_tower)
        side = anchor_side(anchor_scale, ANCHOR_SCALE)
        self.anchors = PyramidAnchors(strides, (side,), center_offset=center_offset)
        self.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        usual = pixels_of(backbone)
        self.transform = GeneralizedRCNNTransform(
            min_size,
            max_size,
            list(usual.mean if image_mean is None else image_mean),
            list(usual.std if image_std is None else image_std),
            size_divisible,
        )

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, detections in evaluation.

        Args:
            images: float [3, H, W] each, RGB in 0..1, of any sizes.
            targets: in training one for each image: boxes, float [n, 4] (x1, y1, x2, y2 in
                pixels), and labels, int64 [n] in 1..num_classes; n may be 0.

        Returns:
            In training the scalar losses "classification", "bbox_regression" and "bbox_ctrness"
            (torchvision's names). In evaluation for each image boxes, float32 [m, 4] (x1, y1, x2,
            y2 in its pixels), scores, float32 [m], best first, and labels, int64 [m].

        Raises:
            ValueError: images or targets that do not fit, before anything runs.
        """
        check_images(images)
        if self.training:
            check_targets(images, targets, self.num_classes)
        elif not len(images):
            return []
        batch, resized = self.transform(images, targets if self.training else None)
        features = list(self.backbone(batch.tensors).values())
        predictions, anchors = self.head(features), self.anchors.levels(features)
        if self.training:
            return self._losses(predictions, anchors, resized)
        found = [
            self._detect(Predictions(*([p[i] for p in ps] for ps in predictions)), anchors, size)
            for i, size in enumerate(batch.image_sizes)
        ]
        sizes = [tuple(image.shape[-2:]) for image in images]
        return self.transform.postprocess(found, batch.image_sizes, sizes)

    def _losses(
        self, predictions: Predictions, anchors: list[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        logits, deltas, centerness = (torch.cat(levels, dim=1) for levels in predictions)
        flat = torch.cat(anchors)
        owners = [assign(anchors, target["boxes"].float(), self.topk) for target in targets]
        positive = torch.stack(owners) >= 0  # [N, A]
        image, anchor = positive.nonzero(as_tuple=True)
        chosen = [owner[owner >= 0] for owner in owners]
        pairs = list(zip(targets, chosen, strict=True))
        box = torch.cat([target["boxes"].float()[index] for target, index in pairs])
        label = torch.cat([target["labels"][index] for target, index in pairs])
        classes = torch.zeros_like(logits)
        classes[image, anchor, label - 1] = 1

        left, top, right, bottom = margins(centers(flat[anchor]), box).unbind(-1)
        horizontal = torch.minimum(left, right) / torch.maximum(left, right)
        vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
        centered = (horizontal * vertical).sqrt()

        totals = torch.stack((positive.sum(1).clamp(min=1).sum().float(), centered.sum()))
        count, weight = _mean_over_ranks(totals).clamp(min=1)
        predicted = self.box_coder.decode_single(deltas[positive], flat[anchor])
        giou = generalized_box_iou_loss(predicted, box)
        return {
            "classification": sigmoid_focal_loss(logits, classes, reduction="sum") / count,
            "bbox_regression": _BOX_WEIGHT * (giou * centered).sum() / weight,
            "bbox_ctrness": F.binary_cross_entropy_with_logits(
                centerness[positive], centered, reduction="sum"
            )
            / count,
        }

    def _detect(
        self, predictions: Predictions, anchors: list[Tensor], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Detections of one image of ``size`` (height, width) before it is scaled back."""
        early = self.postprocess == "mmdet"
        parts = []
        for logits, deltas, centerness, level in zip(*predictions, anchors, strict=True):
            probabilities = logits.sigmoid()
            anchor, kind = (probabilities > self.score_threshold).nonzero(as_tuple=True)
            probability = probabilities[anchor, kind]
            score = probability * centerness.sigmoid()[anchor]
            rank = probability if early else score
            best = rank.topk(min(self.candidates, len(rank))).indices
            anchor = anchor[best]
            boxes = self.box_coder.decode_single(deltas[anchor], level[anchor])
            parts.append((boxes, score[best], kind[best]))
        boxes, scores, kinds = (torch.cat(levels) for levels in zip(*parts, strict=True))

        found = boxes, scores, kinds
        if early:
            found = _clip(*found, size)
        keep = batched_nms(*found, self.nms_threshold)[: self.detections]
        boxes, scores, kinds = (values[keep] for values in found)
        if not early:
            boxes, scores, kinds = _clip(boxes, scores, kinds, size)
        return {"boxes": boxes, "scores": scores, "labels": kinds + 1}

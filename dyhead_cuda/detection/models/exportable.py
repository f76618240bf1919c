"""Detectors as one function of a tensor, for exporters.

The detectors' own ``forward`` takes lists of images of any sizes, and has as many candidates as
pass a threshold: neither can be traced. These modules compute the same from one tensor. A fixed
number of candidates goes through, and those that do not pass are left out before non-maximum
suppression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms, roi_align

from dyhead_cuda.detection.models.adapters import PyramidAnchors, has_area
from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.one_stage import FCOS, RetinaNet
from dyhead_cuda.detection.models.two_stage import FasterRCNN

Size = Sequence[int]  # height, width; symbols while a program is traced


class Detections(NamedTuple):
    """What is found on one image, best first."""

    boxes: Tensor  # [n, 4] x1, y1, x2, y2 in pixels of the input
    scores: Tensor  # [n]
    labels: Tensor  # [n] int64, from 1


class Predictions(NamedTuple):
    """What a one-stage detector predicts for the A anchors of all levels, finest first."""

    anchors: Tensor  # [A, 4] x1, y1, x2, y2 in pixels
    logits: Tensor  # [N, A, K] of the classes
    deltas: Tensor  # [N, A, 4] from the anchor to the box
    centerness: Tensor | None  # [N, A] logits; None for RetinaNet, which has none
    counts: list[int]  # A_l of each level


class Features(nn.Module):
    """Normalises and pads images, as the detector's own transform does; no resizing."""

    mean: Tensor  # [3, 1, 1], of RGB in 0..1
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone: nn.Module = model.backbone
        self.divisor = int(model.transform.size_divisible)
        for name, values in (
            ("mean", model.transform.image_mean),
            ("std", model.transform.image_std),
        ):
            device = next(model.parameters()).device
            self.register_buffer(name, torch.tensor(values, device=device).view(-1, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The levels of images [N, 3, H, W], RGB in 0..1, by name."""
        height, width = images.shape[-2:]
        images = (images - self.mean) / self.std
        below, right = -height % self.divisor, -width % self.divisor
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        return cast(dict[str, Tensor], self.backbone(images))


class Raw(nn.Module):
    """What a one-stage detector predicts, before anything is decoded.

    Args:
        model: :class:`ATSS`, :class:`RetinaNet` or :class:`FCOS`.

    ``forward`` takes images, float32 [N, 3, H, W], RGB in 0..1, and returns by name float32 logits
    [N, A, K], deltas [N, A, 4], centerness [N, A] (logits; RetinaNet has none) and anchors [A, 4],
    of all levels, finest first.
    """

    def __init__(self, model: ATSS | RetinaNet | FCOS) -> None:
        super().__init__()
        self.features, self.model = Features(model), model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = predictions(self.model, self.features(images))
        outputs = {"logits": found.logits, "deltas": found.deltas}
        if found.centerness is not None:
            outputs["centerness"] = found.centerness
        return {**outputs, "anchors": found.anchors}


class OneStage(nn.Module):
    """What a one-stage detector finds on one image.

    Args:
        model: :class:`ATSS`, :class:`RetinaNet` or :class:`FCOS`.

    ``forward`` takes an image, float32 [1, 3, H, W], RGB in 0..1, and returns by name what
    :class:`Detections` has.
    """

    def __init__(self, model: ATSS | RetinaNet | FCOS) -> None:
        super().__init__()
        self.features, self.model, self.rules = Features(model), model, _rules(model)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = predictions(self.model, self.features(images))
        return detect(found, self.rules, images.shape[-2:])._asdict()


class TwoStage(nn.Module):
    """What Faster R-CNN finds on one image; keypoints are left out.

    Args:
        model: :class:`FasterRCNN`.

    ``forward`` is that of :class:`OneStage`.
    """

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.features, self.model = Features(model), model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        size, features = images.shape[-2:], self.features(images)
        proposals = propose(model.rpn, list(features.values()), size)
        heads = model.roi_heads
        count = model.rpn.post_nms_top_n()
        pooled, proposals = pool(heads.box_roi_pool, features, proposals, count)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))

        # Boxes [R, K, 4] and scores [R, K] of the classes but the background, as rows.
        boxes = heads.box_coder.decode_single(deltas, proposals).unflatten(1, (-1, 4))[:, 1:]
        scores = logits.softmax(-1)[:, 1:]
        labels = torch.arange(1, logits.shape[1], device=logits.device).expand_as(scores)
        found = Detections(boxes.flatten(0, 1), scores.flatten(), labels.flatten())
        found = clipped(found, size)
        sides = found.boxes[:, 2:] - found.boxes[:, :2]
        passing = (found.scores > heads.score_thresh) & (sides >= _SMALLEST_BOX).all(1)
        found = chosen(found, passing.nonzero()[:, 0])
        return suppress(found, heads.nms_thresh, heads.detections_per_img)._asdict()


_SMALLEST_BOX = 1e-2  # side in pixels, of torchvision's RoIHeads


def exportable(model: nn.Module, raw: bool = False) -> nn.Module:
    """A detector as a function of one tensor.

    Args:
        model: what :func:`dyhead_cuda.detection.build` makes, in evaluation mode.
        raw: the outputs before decoding, of one-stage detectors.

    Returns:
        :class:`Raw`, :class:`OneStage` or :class:`TwoStage`, of the same parameters.

    Raises:
        ValueError: raw outputs of a two-stage detector, or another module.

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import ModelConfig, build
        >>> from dyhead_cuda.detection.models.exportable import exportable
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5}
        >>> model = build(ModelConfig("atss", 3, "timm/test_resnet.r160_in1k", **small)).eval()
        >>> found = exportable(model, raw=True)(torch.rand(2, 3, 64, 64))
        >>> {name: list(output.shape) for name, output in found.items()}
        {'logits': [2, 84, 3], 'deltas': [2, 84, 4], 'centerness': [2, 84], 'anchors': [84, 4]}
    """
    if isinstance(model, ATSS | RetinaNet | FCOS):
        return (Raw(model) if raw else OneStage(model)).eval()
    if not isinstance(model, FasterRCNN):
        names = "ATSS, RetinaNet, FCOS or FasterRCNN"
        raise ValueError(f"expected {names} of dyhead_cuda, got {type(model).__name__}")
    if raw:
        raise ValueError(
            "expected a one-stage detector for raw outputs, got FasterRCNN, whose second stage "
            "needs decoded boxes; export it with its detections"
        )
    return TwoStage(model).eval()


def predictions(model: Any, features: dict[str, Tensor]) -> Predictions:
    """What a one-stage detector predicts on the levels of its backbone."""
    levels = list(features.values())
    generator: PyramidAnchors = model.anchors if isinstance(model, ATSS) else model.anchor_generator
    anchors = generator.levels(levels)
    counts = [level.shape[0] for level in anchors]
    if isinstance(model, ATSS):
        logits, deltas, centerness = (torch.cat(parts, 1) for parts in model.head(levels))
        return Predictions(torch.cat(anchors), logits, deltas, centerness, counts)
    found = model.head(levels)
    logits, deltas = found["cls_logits"], found["bbox_regression"]
    centered = found["bbox_ctrness"].squeeze(2) if "bbox_ctrness" in found else None
    return Predictions(torch.cat(anchors), logits, deltas, centered, counts)


@dataclass(frozen=True)
class Rules:
    """How a one-stage detector makes detections of its predictions."""

    threshold: float  # on what `threshold_on` names
    threshold_on: str  # "probability" of the class, or "score"
    rank_by: str  # the same names: what the best candidates of a level have most of
    score: Callable[[Tensor, Tensor | None], Tensor]  # of probability and centerness
    decode: Callable[[Tensor, Tensor], Tensor]  # of deltas and anchors
    clip: str  # "before" or "after" non-maximum suppression
    drop_empty: bool  # boxes of no area, after clipping
    candidates: int  # of each level
    nms_threshold: float
    detections: int


def _rules(model: Any) -> Rules:
    if isinstance(model, ATSS):
        early = model.postprocess == "mmdet"
        return Rules(
            threshold=model.score_threshold,
            threshold_on="probability",
            rank_by="probability" if early else "score",
            score=_product,
            decode=model.box_coder.decode_single,
            clip="before" if early else "after",
            drop_empty=True,
            candidates=model.candidates,
            nms_threshold=model.nms_threshold,
            detections=model.detections,
        )
    fcos = isinstance(model, FCOS)
    return Rules(
        threshold=model.score_thresh,
        threshold_on="score",
        rank_by="score",
        score=_geometric_mean if fcos else _probability,
        decode=model.box_coder.decode if fcos else model.box_coder.decode_single,
        clip="before",
        drop_empty=fcos,
        candidates=model.topk_candidates,
        nms_threshold=model.nms_thresh,
        detections=model.detections_per_img,
    )


def _probability(probability: Tensor, centerness: Tensor | None) -> Tensor:
    return probability


def _product(probability: Tensor, centerness: Tensor | None) -> Tensor:
    return probability * cast(Tensor, centerness)


def _geometric_mean(probability: Tensor, centerness: Tensor | None) -> Tensor:
    return (probability * cast(Tensor, centerness)).sqrt()


def detect(found: Predictions, rules: Rules, size: Size) -> Detections:
    """The detections on the first image, of ``size``, of what was predicted."""
    parts, passing = [], []
    centerness = None if found.centerness is None else found.centerness[0]
    levels = [
        found.anchors.split(found.counts),
        found.logits[0].split(found.counts),
        found.deltas[0].split(found.counts),
        [None] * len(found.counts) if centerness is None else centerness.split(found.counts),
    ]
    for anchors, logits, deltas, centered in zip(*levels, strict=True):
        probability = logits.sigmoid()
        score = rules.score(probability, None if centered is None else centered.sigmoid()[:, None])
        values = {"probability": probability, "score": score}
        passes = values[rules.threshold_on] > rules.threshold
        best, index = most(
            values[rules.rank_by].where(passes, -math.inf).flatten(), rules.candidates
        )
        anchor, kind = index // logits.shape[1], index % logits.shape[1]
        boxes = rules.decode(deltas[anchor], anchors[anchor])
        parts.append((boxes, score.flatten()[index], kind + 1))
        passing.append(best > -math.inf)
    every = Detections(*(torch.cat(values) for values in zip(*parts, strict=True)))
    kept = torch.cat(passing)
    if rules.clip == "before":
        every = clipped(every, size)
        if rules.drop_empty:
            kept = kept & has_area(every.boxes)
    best_ones = suppress(chosen(every, kept.nonzero()[:, 0]), rules.nms_threshold, rules.detections)
    if rules.clip == "after":
        best_ones = clipped(best_ones, size)
        if rules.drop_empty:
            best_ones = chosen(best_ones, has_area(best_ones.boxes).nonzero()[:, 0])
    return best_ones


def propose(rpn: Any, levels: Sequence[Tensor], size: Size) -> Tensor:
    """The proposals [R, 4] of a region proposal network for one image of ``size``."""
    objectness, deltas = rpn.head(list(levels))
    counts = [level.shape[1] * level.shape[2] * level.shape[3] for level in objectness]
    logits, deltas = concat_box_prediction_layers(objectness, deltas)
    generator: PyramidAnchors = rpn.anchor_generator
    boxes = rpn.box_coder.decode_single(deltas, torch.cat(generator.levels(levels)))
    parts, passing = [], []
    pairs = zip(logits[:, 0].split(counts), boxes.split(counts), strict=True)
    for i, (logit, box) in enumerate(pairs):
        best, index = most(logit, rpn.pre_nms_top_n())
        score = best.sigmoid()
        parts.append((box[index], score, torch.full_like(index, i)))
        passing.append((best > -math.inf) & (score >= rpn.score_thresh))
    found = clipped(Detections(*(torch.cat(values) for values in zip(*parts, strict=True))), size)
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    kept = torch.cat(passing) & (sides >= rpn.min_size).all(1)
    found = chosen(found, kept.nonzero()[:, 0])
    return suppress(found, rpn.nms_thresh, rpn.post_nms_top_n()).boxes


def pool(
    pooling: MultiScaleRoIAlign, features: dict[str, Tensor], proposals: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The regions of one image's proposals, level by level, and the proposals in the same order.

    torchvision writes the regions of each level into one tensor, whose size cannot be traced.

    Args:
        pooling: of torchvision, with its scales.
        features: by name the levels [1, C, H_l, W_l].
        proposals: [R, 4].
        count: the greatest R.

    Returns:
        [R, C, 7, 7], where the pooling's regions have that size, and [R, 4].
    """
    settings: Any = pooling
    level_of = settings.map_levels([proposals])
    regions, order = [], []
    for i, (name, scale) in enumerate(zip(settings.featmap_names, settings.scales, strict=True)):
        index = (level_of == i).nonzero()[:, 0]
        torch._check(index.shape[0] <= count)
        boxes = proposals[index]
        rows = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)  # of image 0
        ratio = settings.sampling_ratio
        regions.append(roi_align(features[name], rows, settings.output_size, scale, ratio))
        order.append(index)
    return torch.cat(regions), proposals[torch.cat(order)]


def most(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` greatest of values [A], and their places.

    Where there are fewer, minus infinity fills up, with the last place, so that ``count`` is the
    same for images of all sizes.
    """
    best = F.pad(values, (0, count), value=-math.inf).topk(count)
    return best.values, best.indices.clamp(max=values.shape[0] - 1)


def clipped(found: Detections, size: Size) -> Detections:
    """The same with boxes cut at the borders of the image."""
    return found._replace(boxes=clip_boxes_to_image(found.boxes, (size[0], size[1])))


def chosen(found: Detections, index: Tensor) -> Detections:
    """Those at the places ``index`` [n]."""
    return Detections(*(values[index] for values in found))


def suppress(found: Detections, threshold: float, count: int) -> Detections:
    """The ``count`` best after non-maximum suppression in each class, best first.

    torchvision's ``batched_nms`` chooses between two ways by the number of boxes, and cannot be
    traced. As in one of them, classes are moved apart so that their boxes do not meet.
    """
    boxes = found.boxes
    with_origin = torch.cat([boxes.flatten(), boxes.new_zeros(1)])  # there may be no box
    apart = with_origin.max() - with_origin.min() + 1
    moved = boxes + (found.labels * apart)[:, None]
    best = nms(moved, found.scores, threshold)[:count]
    torch._check(
        best.shape[0] <= count
    )  # exporters do not see it, and sums of sizes would overflow
    return chosen(found, best)

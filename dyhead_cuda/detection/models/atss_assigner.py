"""Which anchors an object trains: adaptive training sample selection (ATSS)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

# The published code wants an anchor's centre this many pixels inside the box.
MARGIN = 0.01


def centers(boxes: Tensor) -> Tensor:
    """The centres [..., 2] (x, y) of ``boxes`` [..., 4] xyxy."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def margins(points: Tensor, boxes: Tensor) -> Tensor:
    """From ``points`` [..., 2] to the left, top, right and bottom side of ``boxes``: [..., 4].

    All are positive inside the box.
    """
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), dim=-1)


def assign(anchors: Sequence[Tensor], boxes: Tensor, topk: int = 9) -> Tensor:
    """The ground truth that each anchor is trained on.

    Candidates of a box are, on each level, the ``topk`` anchors whose centres are nearest to its
    own. Those whose IoU with the box is at least mean + standard deviation over its candidates,
    and whose centre lies in the box, are its positives. An anchor that is a positive of several
    boxes goes to the one it overlaps most.

    Args:
        anchors: float32 [A_l, 4] for each level, xyxy in pixels.
        boxes: float32 [G, 4], xyxy in pixels; G may be 0.
        topk: candidates on each level, fewer where a level has fewer anchors.

    Returns:
        int64 [A], A the anchors of all levels in order: an index into ``boxes``, or -1 for
        background.

    Source: arXiv 1912.02424, algorithm 1; mmdet ``ATSSAssigner``, which takes the standard
    deviation with Bessel's correction.
    """
    flat = torch.cat(list(anchors))
    if not len(boxes):
        return torch.full((len(flat),), -1, device=flat.device)
    found, start = [], 0
    for level in anchors:
        distance = (centers(level) - centers(boxes)[:, None]).square().sum(-1)  # [G, A_l]
        nearest = distance.topk(min(topk, len(level)), largest=False).indices
        found.append(nearest + start)
        start += len(level)
    candidates = torch.cat(found, dim=1)  # [G, K]
    overlaps = box_iou(boxes, flat)  # [G, A]
    candidate_overlaps = overlaps.gather(1, candidates)
    correction = min(1, candidates.shape[1] - 1)  # a single candidate deviates by 0, not by NaN
    deviation, mean = torch.std_mean(candidate_overlaps, dim=1, correction=correction, keepdim=True)
    inside = margins(centers(flat)[candidates], boxes[:, None]).amin(-1) > MARGIN
    positive = (candidate_overlaps >= mean + deviation) & inside
    claims = torch.full_like(overlaps, -1)
    claims.scatter_(1, candidates, candidate_overlaps.where(positive, -1))
    best, owner = claims.max(0)
    return owner.where(best >= 0, -1)

"""The assignment of ATSS as the paper writes it, one object and one anchor at a time."""

from __future__ import annotations

import statistics

from torch import Tensor


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - width * height
    return width * height / area


def slow_assign(levels: list[Tensor], boxes: Tensor, topk: int) -> list[int]:
    """Algorithm 1 of arXiv 1912.02424, one object and one anchor at a time."""
    anchors = [anchor.tolist() for level in levels for anchor in level]
    result, best = [-1] * len(anchors), [0.0] * len(anchors)
    for index, box in enumerate(boxes.tolist()):
        cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2

        def distance(i: int, cx: float = cx, cy: float = cy) -> float:
            a = anchors[i]
            return ((a[0] + a[2]) / 2 - cx) ** 2 + ((a[1] + a[3]) / 2 - cy) ** 2

        candidates, start = [], 0
        for level in levels:
            order = sorted(range(start, start + len(level)), key=distance)
            candidates += order[:topk]
            start += len(level)
        overlaps = [iou(anchors[i], box) for i in candidates]
        threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)
        for i, overlap in zip(candidates, overlaps, strict=True):
            x, y = (anchors[i][0] + anchors[i][2]) / 2, (anchors[i][1] + anchors[i][3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= threshold and inside and overlap > best[i]:
                result[i], best[i] = index, overlap
    return result

"""What is measured of a trained detector beside COCO's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from dyhead_cuda.detection.data import DetectionDataset, collate
from dyhead_cuda.detection.evaluation import evaluate, score
from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.atss_assigner import assign
from dyhead_cuda.detection.models.backbones import Pyramid
from dyhead_cuda.detection.training.runs import LAST
from dyhead_cuda.detection.training.trainer import load_model


def measure(run: Path, dataset: DetectionDataset, batch_size: int, device: str) -> dict[str, Any]:
    """All metrics of a finished training after its last step.

    Args:
        run: its folder.
        dataset: to measure on.
        batch_size: images at a time.
        device: "cpu" or "cuda".

    Returns:
        "summary", "per_class", "agnostic_ap" and "positives", see
        :mod:`benchmarks.study.results`.
    """
    loaded, _ = load_model(run / LAST, device)
    model = cast(ATSS, loaded)
    metrics = evaluate(model, dataset, device=device, batch_size=batch_size)
    return {
        "summary": metrics.summary,
        "per_class": metrics.per_class,
        "agnostic_ap": score(dataset, metrics.detections, class_agnostic=True).summary["AP"],
        "positives": positives(model, dataset, batch_size, device),
    }


@torch.inference_mode()
def positives(
    model: ATSS, dataset: DetectionDataset, batch_size: int, device: str
) -> dict[str, dict[str, int]]:
    """By level ("P3", ...) how many anchors are positives, and of how many the class is right.

    The class of an anchor is that of its highest logit, whatever its score.

    Args:
        model: in evaluation mode.
        dataset: images and what is in them.
        batch_size: images at a time.
        device: where the model is.
    """
    levels = cast(Pyramid, model.backbone).levels
    found = {f"P{level}": {"anchors": 0, "right": 0} for level in levels}
    loader: DataLoader[Any] = DataLoader(
        cast(Any, dataset), batch_size, collate_fn=collate, generator=torch.Generator()
    )
    for images, targets in loader:
        batch, resized = model.transform(
            [image.to(device) for image in images],
            [{name: value.to(device) for name, value in each.items()} for each in targets],
        )
        features = list(model.backbone(batch.tensors).values())
        logits, anchors = model.head(features).logits, model.anchors.levels(features)
        sizes = [len(level) for level in anchors]
        for image, target in enumerate(resized):
            owners = assign(anchors, target["boxes"].float(), model.topk).split(sizes)
            for counts, level, owner in zip(found.values(), logits, owners, strict=True):
                chosen = owner >= 0
                labels = target["labels"][owner[chosen]]
                classes = level[image, chosen].argmax(1) + 1
                counts["anchors"] += int(chosen.sum())
                counts["right"] += int((classes == labels).sum())
    return found

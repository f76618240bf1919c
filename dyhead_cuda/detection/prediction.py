"""What a trained detector finds on one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def predict(model: nn.Module, image: Tensor, threshold: float) -> dict[str, Tensor]:
    """The detections on an image.

    Args:
        model: with torchvision's interface, in evaluation mode.
        image: float32 [3, H, W], RGB in 0..1.
        threshold: the lowest score of what is kept.

    Returns:
        boxes [n, 4] (xyxy, pixels), labels [n] from 1, scores [n], descending, and keypoints
        [n, K, 3] (x, y, 1) if the model predicts them; on the CPU.
    """
    with torch.inference_mode():
        (output,) = model([image.to(next(model.parameters()).device)])
    order = output["scores"].argsort(descending=True, stable=True)
    kept = order[output["scores"][order] >= threshold]
    names = ("boxes", "labels", "scores", "keypoints")
    return {name: output[name][kept].cpu() for name in names if name in output}


def describe(found: Mapping[str, Tensor], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Detections as JSON has them: "box" (left, top, right, bottom in pixels), "score", "label",
    "class" (its name) and, if there are any, "keypoints" [K][x, y, 1].

    Args:
        found: what :func:`predict` returns.
        classes: the name of label i + 1.
    """
    rows = {name: values.tolist() for name, values in found.items()}
    detections = []
    for i, label in enumerate(rows["labels"]):
        detection = {
            "box": rows["boxes"][i],
            "score": rows["scores"][i],
            "label": label,
            "class": classes[label - 1],
        }
        if "keypoints" in rows:
            detection["keypoints"] = rows["keypoints"][i]
        detections.append(detection)
    return detections

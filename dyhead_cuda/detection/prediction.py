"""What a trained detector finds on images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyhead_cuda.detection.models.adapters import has_area


def detect(model: nn.Module, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """All detections on images, whatever their scores.

    Args:
        model: with torchvision's interface, in evaluation mode.
        images: float32 [3, H, W] each, RGB in 0..1. In one call they are padded to one size, and
            what a model says of an image depends on its padding: to get what each image would give
            alone, call it with images of one :func:`padded_size`.

    Returns:
        For each image boxes [n, 4] (xyxy, pixels), labels [n] from 1, scores [n], descending, and
        keypoints [n, K, 3] (x, y, 1) if the model predicts them; on the CPU. Boxes without any
        area, of which some models leave a few at the border, are dropped.
    """
    device = next(model.parameters()).device
    with torch.inference_mode():
        outputs = model([image.to(device) for image in images])
    results = []
    for output in outputs:
        order = output["scores"].argsort(descending=True, stable=True)
        kept = order[has_area(output["boxes"])[order]]
        names = ("boxes", "labels", "scores", "keypoints")
        results.append({name: output[name][kept].cpu() for name in names if name in output})
    return results


def above(found: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The detections of :func:`detect` whose scores are at least ``threshold``."""
    kept = found["scores"] >= threshold
    return {name: values[kept] for name, values in found.items()}


def predict(model: nn.Module, image: Tensor, threshold: float) -> dict[str, Tensor]:
    """The detections on one image [3, H, W] with scores of at least ``threshold``."""
    (found,) = detect(model, [image])
    return above(found, threshold)


def padded_size(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Height and width, in pixels, of what a model makes of one image before it looks at it.

    Args:
        model: with torchvision's ``transform``.
        height, width: of the image, in pixels.
    """
    shape = torch.empty(3, height, width, device="meta")  # computes sizes alone
    with torch.inference_mode():
        batch, _ = model.transform([shape])  # type: ignore[operator]
    return batch.tensors.shape[-2], batch.tensors.shape[-1]


def shown_name(name: str) -> str:
    """The name of a class beside other numbers: "dog", but "class 9" for the digit "9"."""
    return f"class {name}" if name.isdigit() else name


def describe(found: Mapping[str, Tensor], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Detections as JSON has them: "box" (left, top, right, bottom in pixels), "score", "label",
    "class" (its name) and, if there are any, "keypoints" [K][x, y, 1].

    Args:
        found: what :func:`detect` returns of an image.
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

"""The second half of the demo: the detector that comes with the package, on scenes it never saw."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torchvision.ops import box_iou

from dyhead_cuda import backend
from dyhead_cuda.commands.attend import observe
from dyhead_cuda.detection.data import DetectionDataset, DigitScenes, Target
from dyhead_cuda.detection.figures import attention_figure, drawing
from dyhead_cuda.detection.names import SHIPPED
from dyhead_cuda.detection.prediction import above, detect
from dyhead_cuda.detection.trained import load_model

SCENES = 4
SEED = 1  # training and validation have 0
THRESHOLD = 0.3
SAME_PLACE = 0.5  # intersection over union of a box that counts as found
# What the backends may differ by, on the detections of both.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.1, 1e-3


def scenes(count: int = SCENES) -> DetectionDataset:
    """Handwritten digits on photographs, both of those kept from training."""
    return DigitScenes(
        "val", count, size=(256, 256), heights=(12, 230), background="photographs", seed=SEED
    )


def show(console: Console, directory: Path, device: torch.device, best: str) -> bool:
    """Detects, compares with the reference, and draws what was found and attended to.

    Args:
        console: for what is to be said.
        directory: of the pictures.
        device: where the detector runs.
        best: the backend there.

    Returns:
        Whether detections on ``best`` and on the reference are the same.
    """
    model, config = load_model(SHIPPED, device)
    dataset = scenes()
    images, targets = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    ours = _detect(model, images)
    with backend("reference"):
        theirs = _detect(model, images)
    right = sum(_count_right(found, target) for found, target in zip(ours, targets, strict=True))
    console.print(
        f"The detector that comes with the package (ATSS, {config['model']['blocks']} DyHead "
        f"blocks), on {len(images)} new scenes: "
        f"{right} of {sum(len(target['labels']) for target in targets)} digits found and named, "
        f"{sum(len(found['labels']) for found in ours)} detections above {THRESHOLD}."
    )
    agree = all(_same(a, b) for a, b in zip(ours, theirs, strict=True))
    verdict = "[green]are the same[/]" if agree else "[bold red]DIFFER[/]"
    console.print(f"Its detections on the {best} backend and on the reference {verdict}.")

    rows = [
        drawing.beside(
            drawing.panel(drawing.draw(image, target, config["classes"]), "annotated"),
            drawing.panel(drawing.draw(image, found, config["classes"]), "predicted"),
        )
        for image, target, found in zip(images, targets, ours, strict=True)
    ]
    detections = directory / "digits_detections.png"
    drawing.save(torch.cat(rows, dim=1), detections)
    attended = directory / "digits_attention.png"
    photograph = Image.fromarray((images[0] * 255).byte().permute(1, 2, 0).numpy())
    observation, points = observe(model, photograph, config["classes"])
    title = "What the trained Dynamic Head attends to: a scene of handwritten digits"
    attention_figure.draw(photograph, observation, points, attended, title)
    for path in (detections, attended):
        console.print(f"Picture: [bold]{escape(str(path))}[/]", soft_wrap=True)
    return agree


def _detect(model: nn.Module, images: tuple[Tensor, ...]) -> list[Target]:
    # One by one, so that no image's padding depends on the others.
    return [above(detect(model, [image])[0], THRESHOLD) for image in images]


def _count_right(found: Target, target: Target) -> int:
    """How many objects have a detection of their class in their place."""
    if not len(found["labels"]) or not len(target["labels"]):
        return 0
    same = found["labels"][:, None] == target["labels"]
    near = box_iou(found["boxes"], target["boxes"]) >= SAME_PLACE
    return int((same & near).any(0).sum())


def _same(ours: Target, theirs: Target) -> bool:
    if len(ours["labels"]) != len(theirs["labels"]):
        return False
    return (
        torch.equal(ours["labels"], theirs["labels"])
        and torch.allclose(ours["boxes"], theirs["boxes"], rtol=0, atol=BOX_TOLERANCE)
        and torch.allclose(ours["scores"], theirs["scores"], rtol=0, atol=SCORE_TOLERANCE)
    )

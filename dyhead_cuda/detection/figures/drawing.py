"""Pictures of detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.font_manager import findfont
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_keypoints

from dyhead_cuda.detection.files import write_atomically

# Of Okabe and Ito's palette, which every kind of colour vision tells apart.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

MIN_SIDE = 480  # in pixels; labels could not be read on smaller pictures
LINE_WIDTH, FONT_SIZE, GAP = 3, 18, 8


def draw(image: Tensor, objects: Mapping[str, Tensor], classes: Sequence[str]) -> Tensor:
    """The boxes, names and keypoints of objects on an image.

    Args:
        image: float32 [3, H, W], RGB in 0..1. Small ones are enlarged by a whole factor.
        objects: boxes [n, 4] (xyxy, pixels), labels [n] from 1, and if they have them scores [n]
            and keypoints [n, K, 3], of which those with a third value above 0 are drawn.
        classes: the name of label i + 1.

    Returns:
        uint8 [3, f H, f W].
    """
    factor = max(1, MIN_SIDE // max(image.shape[1:]))
    pixels = (image.detach().cpu() * 255).round().clamp(0, 255).byte()
    pixels = F.interpolate(pixels[None], scale_factor=factor, mode="nearest")[0]
    labels = objects["labels"].tolist()
    if not labels:
        return pixels
    names = [classes[label - 1] for label in labels]
    if "scores" in objects:
        scores = objects["scores"].tolist()
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    boxes = objects["boxes"].detach().cpu() * factor
    pixels = draw_bounding_boxes(
        pixels,
        boxes,
        names,
        colours,
        width=LINE_WIDTH,
        font=findfont("DejaVu Sans"),  # comes with matplotlib
        font_size=FONT_SIZE,
        label_colors="white",
        fill_labels=True,
    )
    if objects.get("keypoints") is not None:
        for points, colour in zip(objects["keypoints"].detach().cpu(), colours, strict=True):
            places = points[None, :, :2] * factor
            seen = points[None, :, 2] > 0
            pixels = draw_keypoints(pixels, places, colors=colour, radius=3, visibility=seen)
    return pixels


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Two pictures [3, H, W] of one height, with a white gap between them."""
    return torch.cat((left, left.new_full((3, left.shape[1], GAP), 255), right), dim=2)


def save(pixels: Tensor, path: Path) -> None:
    """Writes a picture, uint8 [3, H, W], as a PNG file.

    Raises:
        WriteError: it could not be written.
    """
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    write_atomically(path, lambda file: picture.save(file, "png"))

"""Pictures of detections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from dyhead_cuda.detection.files import write_atomically
from dyhead_cuda.detection.prediction import shown_name

# Of Okabe and Ito's palette, which every kind of colour vision tells apart.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

MAX_BOXES = 30  # a picture of more is unreadable
MIN_SIDE = 480  # in pixels; labels could not be read on smaller pictures
USUAL_SIDE = 900  # in pixels; on larger pictures lines and letters are larger, too
LINE_WIDTH, FONT_SIZE, GAP = 3, 18, 8
POINT_RADIUS = 3

Area = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def draw(
    image: Tensor, objects: Mapping[str, Tensor], classes: Sequence[str], most: int = MAX_BOXES
) -> Tensor:
    """The boxes, names and keypoints of objects on an image.

    Args:
        image: float32 [3, H, W], RGB in 0..1. Small ones are enlarged by a whole factor.
        objects: boxes [n, 4] (xyxy, pixels), labels [n] from 1, and if they have them scores [n],
            descending, and keypoints [n, K, 3], of which those with a third value above 0 are
            drawn.
        classes: the name of label i + 1.
        most: how many objects are drawn, from the first.

    Returns:
        uint8 [3, f H, f W].
    """
    factor = max(1, -(-MIN_SIDE // max(image.shape[1:])))
    pixels = (image.detach().cpu() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    size = image.shape[2] * factor, image.shape[1] * factor
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    canvas, unit = ImageDraw.Draw(picture), _unit(picture.size)
    labels = objects["labels"][:most].tolist()
    names = [shown_name(classes[label - 1]) for label in labels]
    if "scores" in objects:
        scores = objects["scores"][:most].tolist()
        names = [f"{name}: {score:.2f}" for name, score in zip(names, scores, strict=True)]
    boxes = (objects["boxes"][:most].detach().cpu() * factor).tolist()
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    for box, colour in reversed(list(zip(boxes, colours, strict=True))):  # the best on top
        canvas.rectangle(_sorted(box), outline=colour, width=round(LINE_WIDTH * unit))
    if objects.get("keypoints") is not None:
        keypoints = (objects["keypoints"][:most].detach().cpu()).tolist()
        for points, colour in zip(keypoints, colours, strict=True):
            _points(canvas, points, factor, POINT_RADIUS * unit, colour)
    font = _font(unit)
    areas: list[Area] = []
    for box, name in zip(boxes, names, strict=True):
        areas.append(_place(picture.size, box, name, font, areas))
    for area, name, colour in reversed(list(zip(areas, names, colours, strict=True))):
        _write(canvas, area, name, font, colour)
    return _tensor(picture)


def panel(pixels: Tensor, title: str) -> Tensor:
    """A picture, uint8 [3, H, W], below a line of text: uint8 [3, H + the line's height, W]."""
    height, width = pixels.shape[1:]
    font = _font(_unit((width, height)))
    while font.getlength(title) > width - GAP and font.size > FONT_SIZE // 2:
        font = ImageFont.truetype(findfont("DejaVu Sans"), font.size - 1)
    strip = Image.new("RGB", (width, strip_height(width, height)), "white")
    ImageDraw.Draw(strip).text((GAP / 2, strip.height / 2), title, "black", font, anchor="lm")
    return torch.cat((_tensor(strip), pixels), dim=1)


def strip_height(width: int, height: int) -> int:
    """How much higher than a picture its :func:`panel` is, in pixels."""
    return round(1.6 * FONT_SIZE * _unit((width, height)))


def counted(objects: Mapping[str, Tensor], most: int = MAX_BOXES) -> str:
    """How many objects there are, and where :func:`draw` leaves some out, how many it shows."""
    count = len(objects["labels"])
    text = f"{count} object" + "s" * (count != 1)
    if count <= most:
        return text
    return f"{text}, the {'best' if 'scores' in objects else 'first'} {most} drawn"


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Two pictures [3, H, W] of one height, with a white gap between them."""
    return torch.cat((left, left.new_full((3, left.shape[1], GAP), 255), right), dim=2)


def save(pixels: Tensor, path: Path) -> None:
    """Writes a picture, uint8 [3, H, W], as a PNG file.

    Raises:
        WriteError: it could not be written.
    """
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    write_atomically(path, lambda file: picture.save(file, "png"))


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _unit(size: tuple[int, int]) -> float:
    """How much larger than usual lines and letters are on a picture of width and height."""
    return max(1.0, max(size) / USUAL_SIDE)


def _font(unit: float) -> ImageFont.FreeTypeFont:
    # The font comes with matplotlib.
    return ImageFont.truetype(findfont("DejaVu Sans"), round(FONT_SIZE * unit))


def _sorted(box: Sequence[float]) -> Area:
    """A box that Pillow takes: rounding may have swapped its sides."""
    left, top, right, bottom = box
    return left, top, max(left, right), max(top, bottom)


def _points(
    canvas: ImageDraw.ImageDraw,
    points: Sequence[Sequence[float]],
    factor: int,
    radius: float,
    colour: str,
) -> None:
    for x, y, seen in points:
        if seen > 0:
            canvas.circle((x * factor, y * factor), radius, fill=colour)


def _place(
    size: tuple[int, int],
    box: Sequence[float],
    text: str,
    font: ImageFont.FreeTypeFont,
    taken: Sequence[Area],
) -> Area:
    """Where the name of a box is written: at the box, and least over the names before it."""
    width, height = round(font.getlength(text) + font.size / 3), round(1.25 * font.size)
    areas = [(x, y, x + width, y + height) for x, y in _corners(size, box, width, height)]
    return min(areas, key=lambda area: sum(_overlap(area, other) for other in taken))


def _write(
    canvas: ImageDraw.ImageDraw, area: Area, text: str, font: ImageFont.FreeTypeFont, colour: str
) -> None:
    canvas.rectangle(area, fill=colour)
    red, green, blue = ImageColor.getrgb(colour)[:3]
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140  # luma of ITU-R BT.601, to 255
    x, y = area[0] + font.size / 6, (area[1] + area[3]) / 2
    canvas.text((x, y), text, "white" if dark else "black", font, anchor="lm")


def _corners(
    size: tuple[int, int], box: Sequence[float], width: float, height: float
) -> Iterator[tuple[float, float]]:
    """Upper left corners of a label of a box, inside the picture as far as it fits; best first."""
    left, top, right, bottom = box
    for x, y in (
        (left, top - height),  # above
        (left, bottom),  # below
        (right - width, top - height),
        (right - width, bottom),
        (left, top),  # inside
        (left, bottom - height),
    ):
        yield max(0.0, min(x, size[0] - width)), max(0.0, min(y, size[1] - height))


def _overlap(one: Area, other: Area) -> float:
    """The area that two rectangles share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)

"""Scenes composed of objects: a background, clutter, objects of many scales, blur and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from dyhead_cuda.detection.data import backgrounds
from dyhead_cuda.detection.data.objects import INK, Glyph, Source, draw, log_uniform

_ASPECTS = (0.5, 2.0)  # width over height, of clutter
_MAX_COVER = 0.15  # share of the smaller of two boxes that the other may cover
_TRIES = 20  # attempts to place an object before it is left out
_MIN_CONTRAST = 0.3  # difference of luminance between a glyph's ink and its background
_LUMINANCE = np.array((0.299, 0.587, 0.114))
_SUPERSAMPLING = 2


@dataclass(frozen=True)
class Scene:
    """One composed picture with its objects, in drawing order.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        boxes: float32 [n, 4], x1, y1, x2, y2 in pixels, tight around the ink.
        labels: int64 [n], the objects' classes from 0.
        keypoints: float32 [n, 4, 3], the topmost, rightmost, bottommost and leftmost pixel of the
            ink: x and y of its centre, and COCO's visibility (2, or 1 where another object
            lies over it).
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    keypoints: NDArray[np.float32]


@dataclass(frozen=True)
class SceneStyle:
    """What scenes contain.

    Attributes:
        glyphs: minimum and maximum of the objects that are tried; those without a free place are
            left out.
        heights: minimum and maximum height of an object in pixels; log-uniform between.
        clutter: maximum of things that are no object.
        max_angle: degrees by which objects are turned to either side, at most.
    """

    glyphs: tuple[int, int]
    heights: tuple[float, float]
    clutter: int
    max_angle: float

    def __post_init__(self) -> None:
        least, most = self.glyphs
        if not 1 <= least <= most:
            raise ValueError(f"expected glyphs (least, most) with 1 <= least <= most, got {self}")
        if not 8 <= self.heights[0] <= self.heights[1]:
            raise ValueError(f"expected heights (least, most), 8 <= least <= most, got {self}")
        if self.clutter < 0:
            raise ValueError(f"expected clutter of at least 0, got {self}")
        if not 0 <= self.max_angle <= 180:
            raise ValueError(f"expected max_angle of 0 to 180 degrees, got {self}")


def compose(
    rng: np.random.Generator,
    size: tuple[int, int],
    objects: Sequence[Sequence[Source]],
    style: SceneStyle,
    photographs: Sequence[Image.Image] = (),
) -> Scene:
    """One scene, the same for a generator in the same state.

    Args:
        rng: all that is random.
        size: height and width in pixels.
        objects: the sources of each class.
        style: what to draw.
        photographs: RGB; the background is a part of one of them, or paper if there are none.
    """
    if photographs:
        canvas = backgrounds.part(rng, size, photographs)
    else:
        canvas = backgrounds.paper(rng, size)
    for _ in range(rng.integers(style.clutter + 1)):
        _add_clutter(rng, canvas, objects, style)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    inks: list[NDArray[np.bool_]] = []
    owner = np.zeros(size, np.int16)  # 1 + index of the object on top
    for _ in range(rng.integers(style.glyphs[0], style.glyphs[1], endpoint=True)):
        label = int(rng.integers(len(objects)))
        source = objects[label][int(rng.integers(len(objects[label])))]
        drawing = draw(rng, source, size, style)
        box = _free_place(rng, drawing.size, size, boxes)
        if box is None:
            continue
        left, top, right, bottom = box
        corner = (left - drawing.box[0], top - drawing.box[1])
        colours = drawing.colours or _ink_colour(rng, canvas.crop(box))
        canvas.paste(colours, corner, drawing.alpha)
        boxes.append(box)
        labels.append(label)
        inks.append(drawing.ink())
        owner[top:bottom, left:right][inks[-1]] = len(boxes)
    keypoints = np.zeros((len(boxes), 4, 3), np.float32)
    for index, (box, ink) in enumerate(zip(boxes, inks, strict=True)):
        points = _extremes(ink) + np.array(box[:2])
        keypoints[index, :, :2] = points + 0.5
        on_top = owner[points[:, 1], points[:, 0]] == index + 1
        keypoints[index, :, 2] = np.where(on_top, 2, 1)
    return Scene(
        _photograph(rng, canvas),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        keypoints,
    )


def _photograph(rng: np.random.Generator, canvas: Image.Image) -> NDArray[np.uint8]:
    """Slight blur, for half of the scenes, and noise."""
    if rng.random() < 0.5:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = np.asarray(canvas).astype(np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels += np.float32(rng.uniform(0, 12)) * noise
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _free_place(
    rng: np.random.Generator,
    size: tuple[int, int],
    scene: tuple[int, int],
    others: list[tuple[int, int, int, int]],
) -> tuple[int, int, int, int] | None:
    width, height = size
    taken = np.array(others, np.int64).reshape(-1, 4)
    areas = (taken[:, 2] - taken[:, 0]) * (taken[:, 3] - taken[:, 1])
    for _ in range(_TRIES):
        left = int(rng.integers(scene[1] - width, endpoint=True))
        top = int(rng.integers(scene[0] - height, endpoint=True))
        box = (left, top, left + width, top + height)
        over = np.minimum(taken[:, 2:], box[2:]) - np.maximum(taken[:, :2], box[:2])
        common = over.clip(0).prod(axis=1)
        if (common <= _MAX_COVER * np.minimum(areas, width * height)).all():
            return box
    return None


def _ink_colour(rng: np.random.Generator, below: Image.Image) -> tuple[int, int, int]:
    background = np.asarray(below).mean(axis=(0, 1)) @ _LUMINANCE
    while True:
        colour = rng.integers(256, size=3)
        if abs(float(colour @ _LUMINANCE - background)) >= 255 * _MIN_CONTRAST:
            return int(colour[0]), int(colour[1]), int(colour[2])


def _extremes(ink: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The topmost, rightmost, bottommost and leftmost pixel, the middle one of several: [4, 2]."""

    def middle(line: NDArray[np.bool_]) -> int:
        (places,) = np.nonzero(line)
        return int(places[len(places) // 2])

    bottom, right = ink.shape[0] - 1, ink.shape[1] - 1
    return np.array(
        [
            (middle(ink[0]), 0),
            (right, middle(ink[:, right])),
            (middle(ink[bottom]), bottom),
            (0, middle(ink[:, 0])),
        ]
    )


def _add_clutter(
    rng: np.random.Generator,
    canvas: Image.Image,
    objects: Sequence[Sequence[Source]],
    style: SceneStyle,
) -> None:
    """One line, arc, blob, rectangle or piece of an object's mask, of its size, anywhere."""
    scene = (canvas.height, canvas.width)
    kind = rng.integers(5)
    if kind == 4:
        mask = draw(rng, _piece(rng, objects), scene, style).alpha
    else:
        height = log_uniform(rng, style.heights[0], min(style.heights[1], scene[0]))
        width = height * log_uniform(rng, *_ASPECTS)
        mask = _shape(rng, int(kind), (math.ceil(width), math.ceil(height)))
    faded = np.asarray(mask) * np.float32(rng.uniform(0.4, 1))
    mask = Image.fromarray(faded.astype(np.uint8))
    red, green, blue = (int(value) for value in rng.integers(256, size=3))
    left = int(rng.integers(-mask.width // 2, scene[1] - mask.width // 2))
    top = int(rng.integers(-mask.height // 2, scene[0] - mask.height // 2))
    canvas.paste((red, green, blue), (left, top), mask)


def _shape(rng: np.random.Generator, kind: int, size: tuple[int, int]) -> Image.Image:
    width, height = (_SUPERSAMPLING * side for side in size)
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    box = (0, 0, width - 1, height - 1)
    stroke = max(_SUPERSAMPLING, int(rng.uniform(0.06, 0.2) * min(width, height)))
    if kind == 0:  # diagonal, because an upright line looks like a one
        ends = (0, 0, width, height) if rng.random() < 0.5 else (0, height, width, 0)
        draw.line(ends, 255, stroke)
    elif kind == 1:  # at most half a ring, because a whole one looks like a zero
        start = rng.uniform(0, 360)
        draw.arc(box, start, start + rng.uniform(60, 180), 255, stroke)
    elif kind == 2:
        draw.ellipse(box, 255)
    elif rng.random() < 0.5:
        draw.rectangle(box, 255)
    else:
        draw.rectangle(box, None, 255, stroke)
    return mask.reduce(_SUPERSAMPLING)


def _piece(rng: np.random.Generator, objects: Sequence[Sequence[Source]]) -> Glyph:
    """Half or a quarter of an object's mask, with some ink."""
    while True:
        of_class = objects[int(rng.integers(len(objects)))]
        mask = of_class[int(rng.integers(len(of_class)))].mask
        height, width = mask.shape
        top, left = int(rng.integers(2)) * (height // 2), int(rng.integers(2)) * (width // 2)
        cut = rng.integers(3)
        rows = slice(top, top + height // 2) if cut != 0 else slice(None)
        columns = slice(left, left + width // 2) if cut != 1 else slice(None)
        piece = mask[rows, columns]
        if piece.size and piece.max() >= INK:
            return Glyph(piece)

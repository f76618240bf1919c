"""What scenes are composed of: scanned glyphs, drawn in one colour, and cut-out pictures."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from dyhead_cuda.detection.data.pictures import open_image

INK = 128  # pixels of at least this opacity, of 255, are part of an object

_PAD = 2  # empty pixels around a source, so that it fades out before the border
_MARGIN = 3  # the same around a drawing
_MAX_SHEAR = 0.2
_MAX_SIDE_SHARE = 0.8  # of the scene's side that one object may fill
_ASPECTS = (0.5, 2.0)  # width over height, of glyphs
_GLYPH_STRETCHES = (0.65, 2.6)  # of the width; the scans are narrower than high
_PICTURE_STRETCHES = (0.7, 1.4)
_BRIGHTNESS = (0.75, 1.2)  # of pictures
_MAX_SOURCE_SIDE = 512  # pixels; larger pictures are read smaller
_KEPT_SOURCES = 512  # pictures in memory, at most 1 MiB each
_MASK_SIDE = 32


class Ranges(Protocol):
    """The part of a scene's style that objects are drawn by."""

    @property
    def heights(self) -> tuple[float, float]: ...  # pixels; log-uniform between

    @property
    def max_angle(self) -> float: ...  # degrees, to both sides


@dataclass(frozen=True)
class Drawing:
    """An object as it lies in a scene.

    Attributes:
        alpha: "L", opacity with its soft edge.
        box: of the ink within alpha, right and bottom exclusive.
        colours: "RGB" of alpha's size; None for one colour that stands out from the background.
    """

    alpha: Image.Image
    box: tuple[int, int, int, int]
    colours: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the ink."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def ink(self) -> NDArray[np.bool_]:
        """Which pixels of the box are part of the object."""
        return np.asarray(self.alpha.crop(self.box)) >= INK


class Source(Protocol):
    """One picture of an object, of which every scene shows another view."""

    @property
    def mask(self) -> NDArray[np.uint8]:
        """Opacity [h, w], 0..255, small."""

    def view(
        self, rng: np.random.Generator, size: tuple[int, int], ranges: Ranges
    ) -> tuple[Image.Image, Image.Image | None]:
        """``alpha`` and ``colours`` of a :class:`Drawing` for a scene of ``size``."""


def draw(
    rng: np.random.Generator, source: Source, size: tuple[int, int], ranges: Ranges
) -> Drawing:
    """The source at a random height, aspect ratio, angle and shear, for a scene of ``size``."""
    while True:
        alpha, colours = source.view(rng, size, ranges)
        ink = np.asarray(alpha) >= INK
        if ink.any():  # a thin piece may fall between the pixels
            (ys,), (xs,) = np.nonzero(ink.any(axis=1)), np.nonzero(ink.any(axis=0))
            box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
            return Drawing(alpha, box, colours)


def log_uniform(rng: np.random.Generator, least: float, most: float) -> float:
    """A number between the two, whose logarithm is uniform."""
    return math.exp(rng.uniform(math.log(least), math.log(max(least, most))))


@dataclass(frozen=True)
class Glyph:
    """A scan of a glyph: its strokes are drawn in one colour, with a sharp edge at any size.

    Attributes:
        scan: uint8 [h, w], opacity 0..255, with some ink.
    """

    scan: NDArray[np.uint8]

    @property
    def mask(self) -> NDArray[np.uint8]:
        return self.scan

    def view(
        self, rng: np.random.Generator, size: tuple[int, int], ranges: Ranges
    ) -> tuple[Image.Image, None]:
        """The scan is interpolated and its smooth values made steep around the stroke's edge.

        A large glyph then has an edge of about a pixel instead of a wide blur. Where the edge lies
        is drawn, so the width of strokes varies.
        """
        edge = rng.uniform(0.45, 0.65)
        linear = _turn_and_shear(rng, ranges)
        rows, columns = np.nonzero(self.scan >= edge * int(self.scan.max()))
        corners = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
        pixels = np.stack((columns, rows))[:, :, None] + corners[:, None, :]
        outline = pixels.reshape(2, -1) + _PAD
        fit = _fit(rng, linear, outline, size, ranges, _GLYPH_STRETCHES, _ASPECTS)
        smooth = Image.fromarray(np.pad(self.scan, _PAD)).transform(
            fit.size, Image.Transform.AFFINE, fit.coefficients, Image.Resampling.BICUBIC
        )
        ramp = min(0.25, 0.6 / fit.least_scale)  # half the edge's width, in the scan's values
        values = np.linspace(0, 255 / int(self.scan.max()), 256)
        opacity = np.clip(0.5 + (values - edge) / (2 * ramp), 0, 1)
        alpha = np.rint(255 * opacity).astype(np.uint8)[np.asarray(smooth)]
        return Image.fromarray(alpha), None


@dataclass(frozen=True)
class Cutout:
    """A picture with a transparent background, such as an icon; it keeps its colours.

    Attributes:
        path: of an image file with opacity. It is read when it is first needed.
    """

    path: Path

    @property
    def mask(self) -> NDArray[np.uint8]:
        return _read(self.path).mask

    def check(self) -> None:
        """Reads the file.

        Raises:
            ValueError: it is damaged, has no opacity, or is transparent everywhere.
        """
        _read(self.path)

    def view(
        self, rng: np.random.Generator, size: tuple[int, int], ranges: Ranges
    ) -> tuple[Image.Image, Image.Image]:
        picture = _read(self.path)
        linear = _turn_and_shear(rng, ranges)
        anything = (0, math.inf)
        fit = _fit(rng, linear, picture.outline, size, ranges, _PICTURE_STRETCHES, anything)
        # A transform looks at single pixels: what is drawn much smaller is first made smaller.
        factor = max(1, int(1 / fit.greatest_scale))
        small = ImageOps.expand(picture.image.reduce(factor), _PAD)
        a, b, c, d, e, f = (value / factor for value in fit.coefficients)
        drawn = small.transform(
            fit.size,
            Image.Transform.AFFINE,
            (a, b, c + _PAD, d, e, f + _PAD),
            Image.Resampling.BICUBIC,
        )
        bright = ImageEnhance.Brightness(drawn.convert("RGB")).enhance(rng.uniform(*_BRIGHTNESS))
        return drawn.getchannel("A"), bright


class _Fit(NamedTuple):
    size: tuple[int, int]  # of the drawing: width, height
    coefficients: tuple[float, ...]  # from its pixels to the source's, as Pillow wants them
    least_scale: float
    greatest_scale: float


def _turn_and_shear(rng: np.random.Generator, ranges: Ranges) -> NDArray[np.float64]:
    most = math.radians(ranges.max_angle)
    turn = rng.uniform(-most, most)
    shear = rng.uniform(-_MAX_SHEAR, _MAX_SHEAR)
    cos, sin = math.cos(turn), math.sin(turn)
    return np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])


def _fit(
    rng: np.random.Generator,
    linear: NDArray[np.float64],  # [2, 2]
    outline: NDArray[Any],  # [2, n]: x and y of points around what will be ink
    scene: tuple[int, int],
    ranges: Ranges,
    stretches: tuple[float, float],
    aspects: tuple[float, float],
) -> _Fit:
    """Scales what ``linear`` makes of the outline to a random height and aspect ratio."""
    turned = linear @ outline
    low, high = turned.min(axis=1), turned.max(axis=1)
    extent = high - low

    most = _MAX_SIDE_SHARE * np.array((scene[1], scene[0]))  # x, y like all below
    height = log_uniform(rng, ranges.heights[0], min(ranges.heights[1], most[1]))
    stretch = log_uniform(rng, *stretches)
    aspect = float(np.clip(stretch * extent[0] / extent[1], *aspects))
    target = np.array((min(height * aspect, most[0]), height))
    scale = target / extent

    back = np.linalg.inv(scale[:, None] * linear)
    shift = -back @ (_MARGIN - scale * low)
    columns, rows = (math.ceil(side) + 2 * _MARGIN for side in target)
    return _Fit(
        (columns, rows),
        (*back[0].tolist(), float(shift[0]), *back[1].tolist(), float(shift[1])),
        float(scale.min()),
        float(scale.max()),
    )


class _Picture(NamedTuple):
    image: Image.Image  # "RGBA", cropped to what is opaque
    outline: NDArray[np.int64]  # [2, n]
    mask: NDArray[np.uint8]


@functools.lru_cache(maxsize=_KEPT_SOURCES)
def _read(path: Path) -> _Picture:
    try:
        with open_image(path) as image:
            opaque = not image.has_transparency_data
            rgba = image.convert("RGBA")
    except MemoryError:
        raise
    except Exception as error:  # whatever Pillow's decoders raise
        raise ValueError(f"expected a picture, but {path} cannot be read: {error}") from None
    if opaque:
        raise ValueError(
            f"expected a picture with a transparent background, but {path} has no alpha channel; "
            "cut the object out, or leave the file out"
        )
    rgba.thumbnail((_MAX_SOURCE_SIDE, _MAX_SOURCE_SIDE))
    box = rgba.getchannel("A").point(lambda value: 255 if value >= INK else 0).getbbox()
    if box is None:
        raise ValueError(
            f"expected a picture of an object, but {path} is transparent: no pixel is at least "
            "half opaque; leave it out"
        )
    rgba = rgba.crop(box)
    alpha = rgba.getchannel("A")
    small = alpha.copy()
    small.thumbnail((_MASK_SIDE, _MASK_SIDE))
    return _Picture(rgba, _outline(np.asarray(alpha) >= INK), np.array(small))


def _outline(ink: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The corners of each row's first and last pixel; what is between does not matter."""
    (rows,) = np.nonzero(ink.any(axis=1))
    left = ink[rows].argmax(axis=1)
    right = ink.shape[1] - ink[rows, ::-1].argmax(axis=1)
    xs = np.concatenate((left, left, right, right))
    ys = np.concatenate((rows, rows + 1, rows, rows + 1))
    return np.stack((xs, ys))

"""What scenes are composed on: paper, or parts of photographs that ship with Python packages."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from dyhead_cuda.detection.names import Split

# scikit-image's and scikit-learn's, all of them in the wheels: nothing is downloaded. None has
# digits large enough to be taken for the objects. The two splits share none.
PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        *("astronaut", "brick", "camera", "gravel", "hubble_deep_field", "immunohistochemistry"),
        *("moon", "retina", "rocket", "stereo_motorcycle", "china.jpg"),
    ),
    "val": ("chelsea", "coffee", "coins", "grass", "flower.jpg"),
}

_LEAST_PART = 0.3  # of the sides of the largest part that fits
_LUMINANCE = np.array((0.299, 0.587, 0.114))


def paper(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A colour with a smooth texture: a few random values per side, interpolated."""
    cells = rng.integers(2, 7, size=2)
    colour = rng.uniform(40, 215, size=3)
    shade = rng.normal(0, rng.uniform(0, 40), size=(*cells, 1))
    tint = rng.normal(0, rng.uniform(0, 12), size=(*cells, 3))
    grid = np.clip(colour + shade + tint, 0, 255).astype(np.uint8)
    return Image.fromarray(grid).resize((size[1], size[0]), Image.Resampling.BICUBIC)


@functools.cache
def photographs(split: Split) -> tuple[Image.Image, ...]:
    """The split's photographs, RGB.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'background="photographs" needs scikit-image: run pip install scikit-image',
            name=error.name,
        ) from error
    found = []
    for name in PHOTOGRAPHS[split]:
        if name.endswith(".jpg"):
            pixels = load_sample_image(name)
        else:
            loaded = getattr(data, name)()
            pixels = loaded[0] if isinstance(loaded, tuple) else loaded  # a stereo pair: the left
        found.append(Image.fromarray(pixels).convert("RGB"))
    return tuple(found)


def part(
    rng: np.random.Generator, size: tuple[int, int], pictures: Sequence[Image.Image]
) -> Image.Image:
    """A random part of one of the pictures, of ``size`` (height, width), maybe mirrored.

    Its saturation, brightness and balance of colours are drawn, too.
    """
    picture = pictures[int(rng.integers(len(pictures)))]
    height, width = size
    largest = min(picture.width / width, picture.height / height)
    scale = largest * math.exp(rng.uniform(math.log(_LEAST_PART), 0))
    left = rng.uniform(0, picture.width - scale * width)
    top = rng.uniform(0, picture.height - scale * height)
    # Rounding must not lead out of the picture.
    right = min(left + scale * width, picture.width)
    bottom = min(top + scale * height, picture.height)
    scene = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, right, bottom))
    if rng.random() < 0.5:
        scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    saturation = rng.uniform(0, 1.5)
    gains = rng.uniform(0.6, 1.2) * rng.uniform(0.85, 1.15, size=3)
    mixed = saturation * np.eye(3) + (1 - saturation) * _LUMINANCE
    matrix = np.column_stack((gains[:, None] * mixed, np.zeros(3)))
    return scene.convert("RGB", tuple(matrix.ravel().tolist()))

"""Real handwritten digits, composed into scenes: a detection dataset without downloads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from dyhead_cuda import checks
from dyhead_cuda.detection.data.composed import ALL_SCALES, ComposedScenes
from dyhead_cuda.detection.data.objects import Glyph
from dyhead_cuda.detection.names import SPLITS, Background, Split

_VAL_SHARE = 4  # one scan in four is kept for val
_MAX_ANGLE = 45  # degrees; between a six and a nine there are 180
_HEIGHTS: dict[Background, tuple[float, float]] = {"paper": (10, 100), "photographs": ALL_SCALES}


class DigitScenes(ComposedScenes):
    """Scenes of scikit-learn's handwritten digits at many scales, with clutter that is no digit.

    The digits are the 1,797 scans of ``sklearn.datasets.load_digits`` (8 x 8 pixels, 17 grey
    levels), each at a random height (log-uniform), aspect ratio, angle, shear, stroke width and
    colour. The last quarter of each class's scans is used by "val" alone, and never in "train".

    Items are those of :class:`ComposedScenes`; a label is 1 + the digit.

    Args:
        split: "train" or "val".
        num_images: how many scenes (default: 2000 for "train", 400 for "val").
        size: height and width of every scene in pixels.
        heights: minimum and maximum height of a digit in pixels; log-uniform between (default: 10
            to 100 on paper; on photographs from 16 to 0.8 of the scene's side).
        background: "paper" or "photographs".
        max_angle: degrees by which digits are turned to either side, at most 45.
        options: the others of :class:`ComposedScenes`.

    Raises:
        ValueError: unknown split or background, or options out of range.
        ModuleNotFoundError: photographs without scikit-image.

    Source: the scans of https://doi.org/10.24432/C50P49, as scikit-learn has them.

    Example:
        >>> from dyhead_cuda.detection import DigitScenes
        >>> scenes = DigitScenes("train", num_images=2, size=(64, 96), keypoints=True)
        >>> image, target = scenes[0]
        >>> list(image.shape), list(target["keypoints"].shape[1:])
        ([3, 64, 96], [4, 3])
        >>> sorted(target)
        ['area', 'boxes', 'image_id', 'iscrowd', 'keypoints', 'labels']
    """

    kind = "digit"
    description = "handwritten digits"

    def __init__(
        self,
        split: Split,
        num_images: int | None = None,
        *,
        size: tuple[int, int] = (128, 128),
        heights: tuple[float, float] | None = None,
        background: Background = "paper",
        max_angle: float = 15,
        **options: Any,
    ) -> None:
        checks.one_of("split", split, SPLITS)
        checks.one_of("background", background, tuple(_HEIGHTS))
        if not 0 <= max_angle <= _MAX_ANGLE:
            raise ValueError(
                f"expected max_angle of 0 to {_MAX_ANGLE} degrees for digits (a nine upside down "
                f"is a six), got {max_angle}"
            )
        super().__init__(
            split,
            num_images,
            objects=_glyphs(split),
            classes="0123456789",
            size=size,
            heights=_HEIGHTS[background] if heights is None else heights,
            background=background,
            max_angle=max_angle,
            **options,
        )


@functools.cache
def _glyphs(split: Split) -> Sequence[Sequence[Glyph]]:
    return [[Glyph(scan) for scan in scans] for scans in _scans(split)]


@functools.cache
def _scans(split: Split) -> Sequence[NDArray[np.uint8]]:
    """Per class the split's scans, uint8 [n, 8, 8], opacity 0..255.

    The file goes writer by writer, so its last quarter is mostly by other hands.
    """
    digits = load_digits()
    opacity = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    per_class = []
    for number in range(10):
        scans = opacity[digits.target == number]
        first_val = len(scans) - len(scans) // _VAL_SHARE
        per_class.append(scans[:first_val] if split == "train" else scans[first_val:])
    return tuple(per_class)

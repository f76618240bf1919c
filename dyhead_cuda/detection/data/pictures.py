"""Image files of a data set, opened under limits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

# A detector makes the longer side as long as it allows; the shorter one must keep a pixel.
MAX_RATIO = 100


class TooLarge(ValueError):
    """An image of more pixels than Pillow takes for a picture, ``Image.MAX_IMAGE_PIXELS``."""


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file of which only the header has been read.

    Raises:
        TooLarge: before any pixel is decoded. Pillow by itself warns, and raises at twice as many.
        Exception: whatever else Pillow raises for a damaged file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TooLarge(str(error).partition(" pixels")[0] + " pixels") from None
    with image:
        yield image

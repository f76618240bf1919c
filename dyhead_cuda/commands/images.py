"""Photographs as RGB, from whatever file a user has."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MIN_SIDE = 32
MAX_PIXELS = 100_000_000
MAX_RATIO = 8
PAD_MULTIPLE = 128  # the stride of P7: every level then has exactly half the size of the finer one

_NAMED = 10  # files that are named in one line

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class ImageError(Exception):
    """A file that cannot serve as the photograph: what is wrong with it, in one line."""


def find(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files that are meant: a folder stands for the images in it, sorted by their names.

    Args:
        paths: files, which are taken as they are, and folders. Folders inside a folder are not
            looked into.

    Returns:
        The files, and those files in folders that are left out because they are no images. An
        image that is damaged counts as an image.

    Raises:
        ImageError: a folder without images, or one that cannot be read.
    """
    files, others = [], []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        try:
            inside = sorted(entry for entry in path.iterdir() if entry.is_file())
        except OSError as error:
            raise ImageError(f"cannot read the folder {path}: {error.strerror}") from None
        images = [entry for entry in inside if _is_image(entry)]
        if not images:
            raise ImageError(
                f"expected images in {path}, found none among its {len(inside)} files (folders "
                "inside it are not looked into)"
            )
        files += images
        others += [entry for entry in inside if entry not in set(images)]
    return files, others


def skipped(others: Sequence[Path]) -> str:
    """A line that names what :func:`find` leaves out, if it is not too much."""
    names = ", ".join(path.name for path in others[:_NAMED])
    more = len(others) - _NAMED
    return f"left out, as they are no images: {names}" + (f" and {more} more" if more > 0 else "")


def _is_image(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever is to be said is said when it is loaded
            with Image.open(path):
                return True
    except UnidentifiedImageError:
        return False
    except Exception:  # damaged or unreadable, which is said when it is loaded
        return True


def load_photograph(path: str | Path) -> tuple[Image.Image, str]:
    """A photograph and its name.

    Args:
        path: an image file that PIL opens, of any mode: grey, palette, with transparency (laid on
            white), 16-bit, 32-bit or float (stretched to the full range), turned by EXIF (turned
            back); of several frames the first.

    Returns:
        An RGB image and the file's name without its suffix.

    Raises:
        ImageError: no such file, not an image, damaged, too small, too large or too narrow.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may have no end
            kind = "directory" if path.is_dir() else "device or pipe"
            raise ImageError(f"expected an image file, got the {kind} {path}")
        with warnings.catch_warnings():
            # Its size is checked below, before any pixel is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(image.size, path)
                return _to_rgb(ImageOps.exif_transpose(image)), path.stem
    except FileNotFoundError:
        raise ImageError(f"expected an image file, but {path} does not exist") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"expected an image, but {path} is in no format that PIL {Image.__version__} reads"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large: {error}") from None
    except ImageError:
        raise
    except Exception as error:
        # Whatever PIL's decoders raise for damaged files, and the file system for unreadable ones.
        raise ImageError(f"cannot read {path} (damaged or unreadable): {error}") from None


def _check_size(size: tuple[int, int], path: Path) -> None:
    width, height = size
    shown = f"{path} is {width} x {height} pixels"
    if min(size) < MIN_SIDE:
        raise ImageError(f"{shown}; expected at least {MIN_SIDE} on each side")
    if width * height > MAX_PIXELS:
        most = MAX_PIXELS // 1_000_000
        raise ImageError(f"{shown}; expected at most {most} million in all, please shrink it")
    if max(size) > MAX_RATIO * min(size):
        raise ImageError(f"{shown}; expected sides of at most {MAX_RATIO} to 1, please crop it")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_stretched(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _stretched(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits [H, W] as uint8; those that are not finite become black."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    scale = 255 / (high - low) if high > low else 0.0
    return np.where(finite, (np.where(finite, values, low) - low) * scale, 0).round().astype("u1")


def resize(image: Image.Image, longer_side: int) -> Image.Image:
    """The image with its longer side as given, in pixels, and its shape kept."""
    factor = longer_side / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 [1, 3, H, W], normalised with ImageNet's mean and deviation.

    H and W are padded with zeros, at the bottom and on the right, to multiples of 128.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    height, width = pixels.shape[-2:]
    padded_height, padded_width = (-(-s // PAD_MULTIPLE) * PAD_MULTIPLE for s in (height, width))
    out = pixels.new_zeros(1, 3, padded_height, padded_width)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    out[0, :, :height, :width] = (pixels - mean) / std
    return out

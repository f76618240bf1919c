"""A user's own transparent pictures, composed into scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyhead_cuda import checks
from dyhead_cuda.detection.data.composed import ALL_SCALES, ComposedScenes
from dyhead_cuda.detection.data.objects import Cutout
from dyhead_cuda.detection.names import SPLITS, Background, Split

_SUFFIXES = (".png", ".webp")
_VAL_SHARE = 4  # one file in four of a class is kept for val


class CutoutScenes(ComposedScenes):
    """Scenes of the transparent pictures of a folder, such as icons or objects that were cut out.

    Pictures are PNG or WebP files. If there are sub-folders, each is a class of that name, with all
    pictures in it; else each picture is a class by itself, named as the file. Classes and files are
    sorted by name. Of a class with several files the last quarter, at least one, is used by "val"
    alone; the picture of a class with one file is in both splits, at other sizes, angles and
    places.

    Each picture is shown at a random height (log-uniform), aspect ratio, angle, shear and
    brightness. What is at least half opaque is the object. Items are those of
    :class:`ComposedScenes`; a label is 1 + the index into ``classes``.

    Args:
        path: the folder.
        split: "train" or "val".
        num_images: how many scenes (default: 2000 for "train", 400 for "val").
        size: height and width of every scene in pixels.
        heights: minimum and maximum height of an object in pixels; log-uniform between. No object
            is larger than 0.8 of the scene's side.
        background: "paper" or "photographs".
        max_angle: degrees by which objects are turned to either side, at most 180.
        options: the others of :class:`ComposedScenes`.

    Raises:
        ValueError: unknown split or background, options out of range; a folder without pictures,
            with pictures both in sub-folders and beside them, or with one that is damaged, has no
            alpha channel, or is transparent everywhere.
        ModuleNotFoundError: photographs without scikit-image.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from dyhead_cuda.detection import CutoutScenes
        >>> with TemporaryDirectory() as folder:
        ...     for name, colour in (("plum", "purple"), ("lime", "green")):
        ...         Image.new("RGBA", (40, 30), colour).save(Path(folder) / f"{name}.png")
        ...     scenes = CutoutScenes(folder, "train", num_images=2, background="paper")
        ...     image, target = scenes[0]
        >>> scenes.classes, list(image.shape)
        (('lime', 'plum'), [3, 256, 256])
    """

    kind = "object"
    description = "cut-out pictures"

    def __init__(
        self,
        path: str | Path,
        split: Split,
        num_images: int | None = None,
        *,
        size: tuple[int, int] = (256, 256),
        heights: tuple[float, float] = ALL_SCALES,
        background: Background = "photographs",
        max_angle: float = 30,
        **options: Any,
    ) -> None:
        checks.one_of("split", split, SPLITS)
        files = _files(Path(path))
        for each in (file for of_class in files.values() for file in of_class):
            Cutout(each).check()
        super().__init__(
            split,
            num_images,
            objects=[[Cutout(file) for file in _of(split, each)] for each in files.values()],
            classes=list(files),
            size=size,
            heights=heights,
            background=background,
            max_angle=max_angle,
            **options,
        )


def _files(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, all sorted by name."""
    wanted = f"transparent pictures ({', '.join(_SUFFIXES)})"
    if not folder.is_dir():
        raise ValueError(f"expected a folder of {wanted}, but {folder} is not a folder")
    beside = _pictures(folder)
    folders = {
        each.name: _pictures(each)
        for each in sorted(folder.iterdir())
        if each.is_dir() and not each.name.startswith(".")
    }
    if folders and beside:
        raise ValueError(
            f"expected {wanted} of {folder} all in its sub-folders (a class each) or all beside "
            f"each other (a class each), got sub-folders and {beside[0].name}; move it"
        )
    empty = [folder / name for name, files in folders.items() if not files]
    if empty or not (folders or beside):
        raise ValueError(f"expected {wanted} in {(empty or [folder])[0]}, found none")
    classes = {file.stem: [file] for file in beside}
    if len(classes) < len(beside):
        twice = next(file.stem for file in beside if classes[file.stem] != [file])
        raise ValueError(f"expected {wanted} of different names in {folder}, got two of {twice}")
    return folders or classes


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        each
        for each in folder.iterdir()
        if each.suffix.lower() in _SUFFIXES and not each.name.startswith(".")
    )


def _of(split: Split, files: list[Path]) -> list[Path]:
    if len(files) == 1:
        return files
    first_val = len(files) - max(1, len(files) // _VAL_SHARE)
    return files[:first_val] if split == "train" else files[first_val:]

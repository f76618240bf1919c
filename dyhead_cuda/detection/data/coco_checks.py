"""What can be wrong in a COCO-format folder: found, counted, and repaired or left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from dyhead_cuda.detection.data.coco_layout import is_file, shown
from dyhead_cuda.detection.data.pictures import MAX_RATIO, TooLarge, open_image

_LOG = logging.getLogger("dyhead_cuda.detection")
_EXAMPLES = 5
_ROUNDING = (
    1.0  # pixels that a box may leave its image by without a warning: tools round differently
)
# Smaller sides of boxes are none: float32, image sizes that change and mirroring let them vanish.
_MIN_SIDE = 0.01  # in pixels, and
_MIN_STEPS = 8  # of float32 at the far end of the image
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)

# Each kind of problem, and what is done about it.
KINDS = {
    "malformed category": "left out",
    "malformed keypoint names": "ignored, as of a category without keypoints",
    "duplicate category id": "the later one left out",
    "malformed image entry": "left out",
    "duplicate image id": "the later one left out",
    "missing image file": "image left out",
    "unreadable image": "image left out",
    "too large image": "image left out",
    "too narrow image": "image left out",
    "image size differs from the json": "the file's size counts",
    "image without annotations": "kept, as an image without objects",
    "duplicate annotation id": "the later one left out",
    "annotation of an unknown image": "left out",
    "unknown category": "annotation left out",
    "malformed box": "annotation left out",
    "non-finite box": "annotation left out",
    "empty box": "annotation left out",
    "box outside its image": "clipped, or left out where nothing remains",
    "malformed keypoints": "annotation left out",
    "malformed area": "that of the box counts",
    "malformed iscrowd": "annotation left out",
    "damaged image": "read as a black image without objects",
}


@dataclass
class Problem:
    """How often one kind of problem was found, and the first few cases."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


class Problems(dict[str, Problem]):
    """Problems by kind (the keys of ``KINDS``)."""

    def add(self, kind: str, example: str) -> None:
        problem = self.setdefault(kind, Problem())
        problem.count += 1
        if len(problem.examples) < _EXAMPLES:
            problem.examples.append(shown(example))

    def lines(self) -> list[str]:
        return [
            f"{kind} ({KINDS[kind]}): {problem.count}, such as {'; '.join(problem.examples)}"
            for kind, problem in self.items()
        ]

    def report(self, source: Path, strict: bool) -> None:
        """Logs one warning per kind, or with ``strict`` raises ValueError with all of them."""
        if strict and self:
            listed = "\n  ".join(self.lines())
            raise ValueError(f"expected {source} without problems (strict), found\n  {listed}")
        for line in self.lines():
            _LOG.warning("%s: %s", source, line)


@dataclass(frozen=True)
class ImageEntry:
    """An image file that can be opened.

    Attributes:
        width, height: as it is shown, in pixels.
        turn: whether its EXIF orientation is applied.
    """

    id: int
    path: Path
    file_name: str
    width: int
    height: int
    turn: bool


def _is_id(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer that int64 holds, as tensors and COCO's evaluation need it."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    """Whether a number is finite in float32, as which it is trained on."""
    return abs(value) <= _FLOAT32_MAX


def check_categories(entries: list[dict[str, Any]], problems: Problems) -> list[dict[str, Any]]:
    """The categories in the order of their ids, each with a name of its own."""
    known: dict[int, dict[str, Any]] = {}
    for entry in entries:
        number = entry.get("id")
        name = entry.get("name")
        name = number if name is None else name
        if not _is_id(number) or not isinstance(name, (str, int, float)):
            problems.add("malformed category", f"{entry}")
            continue
        if number in known:
            problems.add("duplicate category id", f"{number}")
            continue
        known[number] = {**entry, "name": shown(name)}
        points = entry.get("keypoints")
        if points is not None and not isinstance(points, list):
            problems.add("malformed keypoint names", f"category {number}: {points}")
            del known[number]["keypoints"]
    names = [entry["name"] for entry in known.values()]
    for number, entry in known.items():
        if names.count(entry["name"]) > 1:
            entry["name"] = f"{entry['name']} ({number})"
    return [known[number] for number in sorted(known)]


def check_images(
    entries: list[dict[str, Any]], folder: Path, problems: Problems
) -> tuple[list[ImageEntry], set[int]]:
    """The images that can be opened, and the ids of all that the json lists."""
    images: list[ImageEntry] = []
    listed: set[int] = set()
    for entry in entries:
        number, name = entry.get("id"), entry.get("file_name")
        if not _is_id(number) or not isinstance(name, str):
            problems.add("malformed image entry", f"{name!s:.100}: {entry}")
            continue
        if number in listed:
            problems.add("duplicate image id", f"{number} ({name})")
            continue
        listed.add(number)
        opened = _open_header(entry, folder / name, problems)
        if opened is not None:
            images.append(opened)
    return images, listed


def _open_header(entry: dict[str, Any], path: Path, problems: Problems) -> ImageEntry | None:
    if not is_file(path):
        problems.add("missing image file", str(path))
        return None
    try:
        with open_image(path) as image:
            raw = image.size
            # PNG's own getexif would decode the whole picture.
            sideways = Image.Image.getexif(image).get(_ORIENTATION) in _SIDEWAYS
    except TooLarge as error:
        problems.add("too large image", f"{path} ({error})")
        return None
    except Exception as error:  # whatever Pillow raises for what somebody has in a file
        problems.add("unreadable image", f"{path} ({error or type(error).__name__})")
        return None
    if max(raw) > MAX_RATIO * min(raw):
        problems.add("too narrow image", f"{path} is {raw[0]} x {raw[1]}, over {MAX_RATIO} to 1")
        return None
    turned = raw[::-1] if sideways else raw
    stated = (entry.get("width"), entry.get("height"))
    # Some annotation tools ignore the EXIF orientation; the size in the json shows which do.
    turn = not (sideways and stated == raw != turned)
    width, height = turned if turn else raw
    if stated not in ((width, height), (None, None)):
        problems.add(
            "image size differs from the json",
            f"{path} is {width} x {height}, json {stated[0]} x {stated[1]}",
        )
    return ImageEntry(entry["id"], path, entry["file_name"], width, height, turn)


def check_annotations(
    entries: list[dict[str, Any]],
    images: list[ImageEntry],
    listed: set[int],
    category_ids: tuple[int, ...],
    num_keypoints: int,
    problems: Problems,
) -> list[dict[str, Any]]:
    """The usable annotations, with boxes inside their images, numbered from 1.

    COCOeval takes the id 0 for "no match", so ids are given anew.
    """
    by_id = {image.id: image for image in images}
    good: list[dict[str, Any]] = []
    annotated: set[int] = set()
    for entry, name in _unique(entries, problems):
        number = entry.get("image_id")
        if not _is_id(number) or number not in listed:
            problems.add("annotation of an unknown image", f"{name}, image {shown(number)}")
            continue
        annotated.add(number)
        if number not in by_id:  # its image is a problem already
            continue
        checked = _check_annotation(
            entry, name, by_id[number], category_ids, num_keypoints, problems
        )
        if checked is not None:
            good.append({"id": len(good) + 1, **checked})
    for image in images:
        if image.id not in annotated:
            problems.add("image without annotations", str(image.path))
    return good


def _check_annotation(
    entry: dict[str, Any],
    name: str,
    image: ImageEntry,
    category_ids: tuple[int, ...],
    num_keypoints: int,
    problems: Problems,
) -> dict[str, Any] | None:
    """An annotation of an image, repaired where that is possible; None where it is left out."""
    where = f"{name} of image {image.id} ({image.file_name})"
    category = entry.get("category_id")
    if not _is_number(category) or category not in category_ids:
        problems.add("unknown category", f"{where}: {category}")
        return None
    box = _check_box(entry.get("bbox"), image, where, problems)
    if box is None:
        return None
    area = entry.get("area")
    if area is not None and not (_is_number(area) and _is_finite(area)):
        problems.add("malformed area", f"{where}: {area}")
        area = None
    if area is None or area <= 0:
        area = box[2] * box[3]
    crowd = entry.get("iscrowd")
    if crowd is not None and crowd not in (0, 1):
        problems.add("malformed iscrowd", f"{where}: expected 0 or 1, got {crowd!r}")
        return None
    checked = {
        "image_id": image.id,
        "category_id": int(category),
        "bbox": box,
        "area": float(area),
        "iscrowd": int(bool(crowd)),
    }
    if num_keypoints:
        points = entry.get("keypoints")
        points = [0] * (3 * num_keypoints) if points is None else points
        if not _are_keypoints(points, num_keypoints):
            wanted = f"{where}: expected {3 * num_keypoints} finite numbers, got {points}"
            problems.add("malformed keypoints", wanted)
            return None
        checked["keypoints"] = [float(value) for value in points]
        checked["num_keypoints"] = sum(value > 0 for value in points[2::3])
    return checked


def _unique(
    entries: list[dict[str, Any]], problems: Problems
) -> Iterator[tuple[dict[str, Any], str]]:
    """Entries with a name for messages, without those whose id came before."""
    seen: set[Any] = set()
    for place, entry in enumerate(entries):
        number = entry.get("id")
        if not _is_id(number):
            yield entry, f"annotation without id, number {place + 1} in the list"
            continue
        if number in seen:
            problems.add("duplicate annotation id", str(number))
            continue
        seen.add(number)
        yield entry, f"annotation {number}"


def _check_box(box: Any, image: ImageEntry, where: str, problems: Problems) -> list[float] | None:
    """x, y, width and height inside the image, or None."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        problems.add("malformed box", f"{where}: expected [x, y, width, height], got {box}")
        return None
    if not all(_is_finite(value) for value in box):
        problems.add("non-finite box", f"{where}: {box}")
        return None
    left, top, width, height = (float(value) for value in box)
    if width <= 0 or height <= 0:
        problems.add("empty box", f"{where}: {box}")
        return None
    right, bottom = left + width, top + height
    inside = (
        min(max(left, 0.0), image.width),
        min(max(top, 0.0), image.height),
        min(max(right, 0.0), image.width),
        min(max(bottom, 0.0), image.height),
    )
    moved = max(abs(a - b) for a, b in zip(inside, (left, top, right, bottom), strict=True))
    empty = any(
        high - low < max(_MIN_SIDE, _MIN_STEPS * float(np.spacing(np.float32(side))))
        for low, high, side in (
            (inside[0], inside[2], image.width),
            (inside[1], inside[3], image.height),
        )
    )
    placed = f"{where}: {box} in {image.width} x {image.height} pixels"
    if moved > _ROUNDING:
        problems.add("box outside its image", placed)
    elif empty:
        problems.add("empty box", f"{placed}, expected sides of at least {_MIN_SIDE}")
    if empty:
        return None
    return [inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1]]


def _are_keypoints(points: Any, num_keypoints: int) -> bool:
    return (
        isinstance(points, list)
        and len(points) == 3 * num_keypoints
        and all(_is_number(value) and _is_finite(value) for value in points)
    )

"""Where a COCO-format folder keeps the json and the images of a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHOWN = 300  # characters of a json's values in a message
_SAME_SPLIT = {"val": ("val", "valid", "validation")}


def find_json(folder: Path, split: str) -> Path:
    """The split's annotations: the first of these that is there.

    ``annotations/instances_<split>.json``, ``annotations/instances_<split>*.json`` (one file, as
    instances_val2017.json), ``<split>/_annotations.coco.json`` (Roboflow),
    ``annotations_<split>.json``, ``<split>.json``; "val" may also be written "valid" or
    "validation".

    Raises:
        ValueError: none of them, with what was looked for, or several of the same pattern.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder in COCO's format, but {folder} is not a folder")
    patterns = [
        pattern
        for name in _SAME_SPLIT.get(split, (split,))
        for pattern in (
            f"annotations/instances_{name}.json",
            f"annotations/instances_{name}[0-9_]*.json",
            f"{name}/_annotations.coco.json",
            f"annotations_{name}.json",
            f"{name}.json",
        )
    ]
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"expected one {pattern} in {folder}, got {names}; leave only one")
        if found:
            return found[0]
    raise ValueError(
        f'expected annotations of split "{split}" in {folder}, found none of '
        f"{', '.join(patterns)}; "
        "rename the file, or name it with annotations=FILE (train: --train-annotations, "
        "--val-annotations; eval: --annotations)"
    )


def find_images(
    folder: Path,
    split: str,
    annotations: Path,
    names: list[str],
    given: str | Path | None = None,
) -> Path:
    """The folder that the json's file names count from: the first that holds one of them.

    Tried are the json's own folder, ``<split>``, ``<split>2017``, ``images/<split>``,
    ``images/<split>2017``, ``images`` and the folder itself, with the split also as the json's
    name spells it (instances_minival.json: ``minival``). A folder that is ``given`` is the only
    one that is tried.

    Raises:
        ValueError: none of them, with what was looked for.
    """
    spelled = annotations.stem.removeprefix("instances_").removeprefix("annotations_")
    places = [annotations.parent] if annotations.parent.name != "annotations" else []
    for name in dict.fromkeys((spelled, *_SAME_SPLIT.get(split, (split,)))):
        places += [folder / name, folder / f"{name}2017"]
        places += [folder / "images" / name, folder / "images" / f"{name}2017"]
    places = list(dict.fromkeys((*places, folder / "images", folder)))
    places.sort(key=lambda place: place == folder)  # it contains the others, so try it last
    if given is not None:
        places = [Path(given)]
    for place in places:
        if any(is_file(place / name) for name in names):
            return place
    looked = ", ".join(str(place) for place in places)
    raise ValueError(
        f"expected the images of {annotations} (such as {shown(names[0])}), found none in {looked}"
        "; name their folder with images=FOLDER (train: --train-images-folder, "
        "--val-images-folder; eval: --images-folder)"
    )


def shown(value: Any) -> str:
    """Anything of a json in a message: one line, of limited length, that any terminal can print."""
    text = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in str(value)[: _SHOWN + 1]
    )
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that the system does not take is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A COCO json with its three lists.

    Raises:
        ValueError: unreadable, not JSON, or a list that is not there.
    """
    try:
        if not path.is_file():  # a pipe may have no end
            raise ValueError("it is no regular file")
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some tools write a mark
    except RecursionError:
        raise ValueError(
            f"expected a COCO json, but {path} cannot be read: it is nested too deeply"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a COCO json, but {path} cannot be read: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f'expected a list "{key}" in {path}; is it in COCO\'s format?')
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise ValueError(f'expected objects in the list "{key}" of {path}')
    for key in ("images", "categories"):
        if not content[key]:
            raise ValueError(f'expected at least one entry in "{key}" of {path}, got none')
    return content

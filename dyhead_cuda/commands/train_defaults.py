"""What ``python -m dyhead_cuda train`` takes where an option is left out.

For digits, values that fit scenes of 128 pixels and give a useful detector in minutes on two cores;
for a folder, the published ones.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from dyhead_cuda.detection.names import TWO_STAGE

# By the names that the parsed arguments have.
DIGITS: dict[str, Any] = {
    "images": 4000,
    "val_images": 200,
    "scene_size": 128,
    "backbone": "timm/test_resnet.r160_in1k",
    "channels": 64,
    "blocks": 2,
    "lr": 2e-3,
    "steps": 3000,
}
FOLDER: dict[str, Any] = {
    "backbone": "resnet50",
    "channels": 256,
    "blocks": 6,
    "lr": 2e-4,
    "steps": 1000,
}
LARGE_SCENE_SIZE = 256  # of all scenes but digits on paper
TWO_STAGE_LEVELS = (2, 6)
DIGITS_LEVELS = (3, 6)  # on 128 pixels a P7 is one pixel
FOLDER_LEVELS = (3, 7)

# For digits: enough evaluations for a curve, and few enough to take little of the time.
EVALUATIONS, MIN_EVAL_EVERY = 10, 50


def stated(name: str) -> str:
    """The defaults of an option, for its help."""
    digits, folder = (table[name] for table in (DIGITS, FOLDER))
    return f"default: {digits} for digits, {folder} for a folder"


def chosen(arguments: argparse.Namespace, name: str) -> Any:
    """The value of an option, or its default for the data."""
    value = getattr(arguments, name)
    return _table(arguments)[name] if value is None else value


def scene_size(arguments: argparse.Namespace) -> int:
    """Height and width of composed scenes in pixels."""
    given: int | None = arguments.scene_size
    if given is not None:
        return given
    on_paper = arguments.objects is None and arguments.background != "photographs"
    return int(DIGITS["scene_size"]) if on_paper else LARGE_SCENE_SIZE


def levels(arguments: argparse.Namespace) -> tuple[int, int]:
    """The first and the last level of the pyramid."""
    given: tuple[int, int] | None = arguments.levels
    if given is not None:
        return given
    if arguments.model in TWO_STAGE:
        return TWO_STAGE_LEVELS
    return DIGITS_LEVELS if arguments.data == "digits" else FOLDER_LEVELS


def eval_every(arguments: argparse.Namespace, steps: int) -> int | None:
    """The steps between evaluations, of so many in all."""
    given: int | None = arguments.eval_every
    if given is not None or arguments.data != "digits":
        return given
    return max(MIN_EVAL_EVERY, math.ceil(steps / EVALUATIONS))


def _table(arguments: argparse.Namespace) -> dict[str, Any]:
    return DIGITS if arguments.data == "digits" else FOLDER

"""``python -m dyhead_cuda attend``: what the head of a trained detector attends to on images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from dyhead_cuda.commands import images
from dyhead_cuda.commands.common import check_names, fail, fail_for_memory
from dyhead_cuda.commands.detector_arguments import DEFAULT_POINTS
from dyhead_cuda.detection import trained
from dyhead_cuda.detection.figures import attention, attention_figure
from dyhead_cuda.detection.figures.attention import Observation, Point
from dyhead_cuda.detection.files import make_folder, plain, write_atomically
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.inspect import figure


def run(arguments: argparse.Namespace) -> int:
    """Draws a picture and writes a JSON file of each image.

    Returns:
        0, or 2 if the images, the checkpoint or what to show cannot be used.
    """
    console = Console(highlight=False)
    try:
        _run(arguments, console)
    except (images.ImageError, RunError, ValueError, OSError, ImportError) as error:
        return fail(error)
    except (MemoryError, RuntimeError) as error:
        return fail_for_memory(error, "shrink the images")
    return 0


def _run(arguments: argparse.Namespace, console: Console) -> None:
    paths, others = images.find(arguments.images)
    check_names(paths)
    device = parallel.choose_device(arguments.device)
    model, config = trained.load_model(arguments.checkpoint, device)
    attention.head_of(model)
    make_folder(arguments.out)
    classes = config["classes"]
    for path in paths:
        image, name = images.load_photograph(path)
        observation, points = observe(model, image, classes, arguments.box, arguments.points)
        blocks = _shown(arguments.blocks, observation)
        picture = arguments.out / f"{name}_attention.png"
        detector = config["model"]["detector"]
        title = (
            f"What the Dynamic Head attends to: {path.name}, {detector} of {arguments.checkpoint}"
        )
        attention_figure.draw(image, observation, points, picture, title, blocks)
        numbers = {"image": str(path), "checkpoint": str(arguments.checkpoint)}
        numbers |= attention.to_dict(observation, points)
        _write_line(picture.with_suffix(".json"), numbers)
        found = "; ".join(f"{p.text} on {observation.level_names[p.level]}" for p in points)
        if arguments.points is None and all(point.box is None for point in points):
            found = f"no object was detected, so these places are shown: {found}"
        console.print(f"{escape(str(picture))}: {escape(found)}", soft_wrap=True)
    if others:
        console.print(escape(images.skipped(others)), soft_wrap=True)


def _write_line(path: Path, numbers: Mapping[str, Any]) -> None:
    """JSON without line breaks, which would make most of it."""
    text = json.dumps(plain(numbers)).encode()
    write_atomically(path, lambda file: file.write(text))


def observe(
    model: nn.Module,
    image: Image.Image,
    classes: Sequence[str],
    boxes: Sequence[int] | None = None,
    places: Sequence[tuple[float, float, str | None]] | None = None,
) -> tuple[Observation, list[Point]]:
    """An image through a detector, and the points to show.

    Args:
        model: with a Dynamic Head.
        image: RGB.
        classes: names of labels 1, 2, ...
        boxes: detections to show, by rank from 0.
        places: or x, y and the name of a level or None. With neither the best detections or,
            where nothing is detected, places with strong edges.
    """
    pixels = pil_to_tensor(image).float() / 255
    observation = attention.observe(model, pixels.to(next(model.parameters()).device))
    if places is not None:
        points = [_place(observation, *place) for place in places]
    else:
        indices = observation.best(DEFAULT_POINTS) if boxes is None else boxes
        points = [observation.detected(index, classes) for index in indices]
        if not points:
            margin = round(observation.frame.strides[0] * 4)
            found = figure.interest_points(image, DEFAULT_POINTS, margin)
            points = [observation.place(x, y) for x, y in found]
    return observation, points


def _place(observation: Observation, x: float, y: float, level: str | None) -> Point:
    names: Any = observation.level_names
    if level is not None and level not in names:
        raise ValueError(f"expected a level of {', '.join(names)}, got {level!r}")
    return observation.place(x, y, None if level is None else names.index(level))


def _shown(blocks: list[int] | None, observation: Observation) -> list[int] | None:
    count = len(observation.blocks)
    if blocks is not None and max(blocks) >= count:
        raise ValueError(f"expected blocks from 1 to {count}, got {max(blocks) + 1}")
    return blocks

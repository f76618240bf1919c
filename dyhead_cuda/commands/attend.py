"""``python -m dyhead_cuda attend``: what the head of a trained detector attends to on images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from dyhead_cuda.commands import images
from dyhead_cuda.commands.common import add_images, check_names, fail
from dyhead_cuda.detection.figures import attention, attention_figure
from dyhead_cuda.detection.figures.attention import Observation, Point
from dyhead_cuda.detection.training import parallel, trainer
from dyhead_cuda.detection.training.runs import RunError
from dyhead_cuda.inspect import figure

DEFAULT_POINTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda attend``."""
    add_images(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--box",
        nargs="+",
        type=int,
        metavar="INDEX",
        help="show the centres of these detections; 0 has the best score (default: the best "
        f"{DEFAULT_POINTS} of different objects)",
    )
    where.add_argument(
        "--points",
        nargs="+",
        type=_point,
        metavar="X,Y[,LEVEL]",
        help="show these places, in pixels of the image, e.g. 120,80 or 120,80,P4; without a level "
        "that of the smallest detection around it, or else the finest",
    )
    parser.add_argument(
        "--blocks",
        type=_blocks,
        default=None,
        metavar="all|I,J,...",
        help="the blocks to draw, from 1 (default: all)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("attention"), help="folder (default: %(default)s)"
    )


def _point(text: str) -> tuple[float, float, str | None]:
    x, _, rest = text.partition(",")
    y, _, level = rest.partition(",")
    try:
        return float(x), float(y), level or None
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected X,Y or X,Y,LEVEL such as 120,80,P4, got {text!r}"
        ) from None


def _blocks(text: str) -> list[int] | None:
    if text == "all":
        return None
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected all or numbers from 1 as 1,3,6, got {text!r}")
    return [number - 1 for number in numbers]


def run(arguments: argparse.Namespace) -> int:
    """Draws a picture and writes a JSON file of each image.

    Returns:
        0, or 2 if the images, the checkpoint or what to show cannot be used.
    """
    console = Console(highlight=False)
    try:
        _run(arguments, console)
    except (images.ImageError, RunError, ValueError, OSError) as error:
        return fail(error)
    return 0


def _run(arguments: argparse.Namespace, console: Console) -> None:
    check_names(arguments.images)
    device = parallel.choose_device(arguments.device)
    model, config = trainer.load_model(arguments.checkpoint, device)
    attention.head_of(model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    classes = config["classes"]
    for path in arguments.images:
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
        picture.with_suffix(".json").write_text(json.dumps(numbers))
        found = ", ".join(f"{p.text} on {observation.level_names[p.level]}" for p in points)
        console.print(f"{escape(str(picture))}: {escape(found)}", soft_wrap=True)


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

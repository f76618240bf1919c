"""Draws the pictures in docs/images: python docs/pictures.py

Needs what the demo needs. Everything is computed by the package, so a picture cannot say what the
code does not do: ``quirk.png`` and ``offsets.png`` explain ``high_offset`` (docs/numerics.md), and
``demo.png`` is what ``make demo`` draws, made smaller.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from dyhead_cuda.pyramid import OFFSET_CHANNELS, TAPS, HighOffset
from dyhead_cuda.reference import high_offset_and_mask

IMAGES = Path(__file__).resolve().parent / "images"
LARGE, SMALL = (8, 8), (4, 4)
# Of Okabe and Ito's palette, which every kind of colour vision tells apart.
COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7")
GREY = "#E8E8E8"
SHOWN = ("dy of tap 0", "dx of tap 0", "dy of tap 1", "dx of tap 1")  # channels of the offsets


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG of few colours, which is small."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100)
    shrink(path, path, colours=64)


def shrink(source: Path, path: Path, colours: int, width: int | None = None) -> None:
    """A PNG of few colours, scaled to a width in pixels."""
    picture = Image.open(source).convert("RGB")
    if width is not None:
        size = (width, round(picture.height * width / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)


def read(offset: Tensor, high_offset: HighOffset) -> Tensor:
    """The offsets [18, h, w] that the branch on the coarser level reads of [18, H, W]."""
    if high_offset == "aligned":
        return offset
    mask = torch.ones(1, TAPS, *LARGE)
    return high_offset_and_mask(offset[None], mask, SMALL, high_offset)[0][0]


def quirk(path: Path) -> None:
    """Which values of the large map become which of the small one."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    numbers = torch.arange(float(OFFSET_CHANNELS * LARGE[0] * LARGE[1])).view(-1, *LARGE)
    rows: tuple[tuple[HighOffset, str], ...] = (
        ("flat", '"flat": the memory is read as if the map were small'),
        ("crop", '"crop": the upper left part of each channel'),
    )
    halves: Any = figure.subfigures(2, 1)
    for half, (name, title) in zip(halves, rows, strict=True):
        half.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        all_axes = half.subplots(1, 6, width_ratios=(2, 2, 1, 1, 1, 1))
        small = read(numbers, name)[: len(SHOWN)]
        reader = {int(value): k for k, channel in enumerate(small) for value in channel.flatten()}
        for k, axes in enumerate(all_axes[:2]):
            cells(axes, numbers[k], reader)
            axes.set_title(f"predicted: {SHOWN[k]}", fontsize=9)
        for k, axes in enumerate(all_axes[2:]):
            cells(axes, small[k], reader)
            axes.set_title(f"used as\n{SHOWN[k]}", fontsize=9)
    save(figure, path)


def cells(axes: Axes, values: Tensor, reader: dict[int, int]) -> None:
    """One map as squares with their place in memory, in the colour of the channel that reads it."""
    height, width = values.shape
    for y in range(height):
        for x in range(width):
            value = int(values[y, x])
            colour = COLOURS[reader[value]] if value in reader else GREY
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white"))
            axes.text(x + 0.5, y + 0.5, str(value), ha="center", va="center", fontsize=6)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def offsets(path: Path) -> None:
    """A field of offsets that points to the middle of the map, as each variant reads it."""
    height, width = LARGE
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    towards = torch.stack([height / 2 - y, width / 2 - x])  # dy, dx in pixels
    field = towards.repeat(TAPS, 1, 1)
    titles: dict[HighOffset, str] = {
        "aligned": 'as predicted, and as\n"aligned" reads it',
        "flat": 'as "flat" and\n"mmdet_main" read it',
        "crop": 'as "crop"\nreads it',
    }
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        middle = 2 * (TAPS // 2)  # dy and dx of the tap in the centre
        arrows(axes, read(field, name)[middle : middle + 2], height)
        axes.set_title(title, fontsize=9)
    save(figure, path)


def arrows(axes: Axes, offset: Tensor, side: int) -> None:
    """The offsets [2, h, w] of one tap, drawn at their pixels of a map of ``side`` pixels."""
    _, height, width = offset.shape
    step = side / height
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) * step, (torch.arange(width) + 0.5) * step, indexing="ij"
    )
    dy, dx = offset * step  # on the coarser level a pixel is larger, and so is an offset
    axes.quiver(x, y, dx, dy, angles="xy", scale_units="xy", scale=1, width=0.008, color="#0072B2")
    axes.set(xlim=(-1, side + 1), ylim=(side + 1, -1), aspect="equal", xticks=[], yticks=[])


def demo(path: Path) -> None:
    """What ``make demo`` draws."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dyhead_cuda", "demo", "--output", folder]
        subprocess.run(command, check=True)
        (picture,) = Path(folder).glob("*.png")
        shrink(picture, path, colours=128, width=900)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    quirk(IMAGES / "quirk.png")
    offsets(IMAGES / "offsets.png")
    demo(IMAGES / "demo.png")

"""The picture of what a Dynamic Head attends to: a row for each block, a column for each view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from dyhead_cuda.detection.figures.attention import Observation, Point
from dyhead_cuda.detection.files import write_atomically
from dyhead_cuda.inspect import figure
from dyhead_cuda.inspect.record import BRANCHES, Samples

MAX_POINTS = 4
WIDTH, DPI = 24.0, 100  # inches, and pixels in one of them
MARGIN, TOP, BOTTOM, GAP, BETWEEN = 0.5, 1.9, 0.2, 0.75, 0.12  # inches
AFTER_INPUT = 0.25  # below the first row, inches: titles
MIN_SAMPLES_WIDTH = 2  # panels: room for the photograph and the legend
MAX_ROW, MIN_ROW = 3.0, 1.7  # of a row, inches
GATES_WIDTH, SWITCHES_WIDTH = 1.2, 1.9  # in panels
# Colour and marker both tell the branches apart; the last is drawn over the others.
BRANCH_MARKS = {
    "high": (figure.VERMILION, "^"),
    "low": (figure.SKY, "s"),
    "mid": (figure.YELLOW, "o"),
}
MAX_DOT = 90.0  # square points, for a weight of 1
MIN_WINDOW = 3.0  # half the side of a close-up, in pixels of the level
SHOWN = 0.9  # the share of all samples, by weight, that a close-up holds
MIN_GATE = 0.5  # of relu and hsigmoid

ENERGY_TEXT = (
    "Features: their energy at each level",
    "L2 norm over the channels, relative to its median in the image.\n"
    "Top: what comes into the head. Below: what each block makes of it.",
)
BOXES_TEXT = "\nBoxes: the numbered detections, at the levels that made them."
SAMPLES_TEXT = (
    "Spatial attention: where one pixel reads",
    "Cross: a pixel of the named level{made}.\n"
    "Marks: what it reads there and in the levels beside it.\n"
    "Lines: from the regular 3 x 3 grid. Area: modulation.",
)
GATES_TEXT = (
    "Scale attention: gates",
    "Weight of each branch in\neach level.",
)
SWITCHES_TEXT = (
    "Task attention: channel switches",
    "out = max(a1 x + b1, a2 x + b2) in each channel:\n"
    "the share of the pixels where the first wins.",
)


def draw(
    image: Image.Image,
    observation: Observation,
    points: Sequence[Point],
    path: Path,
    title: str,
    blocks: Sequence[int] | None = None,
) -> None:
    """Writes the picture, 2400 pixels wide.

    Args:
        image: RGB, the one that was observed.
        observation: what the detector did with it.
        points: one to four pixels whose readings are drawn.
        path: the PNG to write.
        title: the headline.
        blocks: which blocks are drawn, from 0; by default all.

    Raises:
        ValueError: no points or more than there is room for; an image of another size.
        WriteError: it could not be written.
    """
    if not 1 <= len(points) <= MAX_POINTS:
        raise ValueError(f"expected 1 to {MAX_POINTS} points, got {len(points)}")
    if image.size != observation.frame.image:
        raise ValueError(
            f"expected the observed image of {observation.frame.image} pixels, got {image.size}"
        )
    with mpl.rc_context(figure.STYLE):
        picture = _Picture(image, observation, points, blocks or range(len(observation.blocks)))
        picture.headline(title)
        picture.energies()
        picture.samples()
        picture.gates()
        picture.switches()
        write_atomically(path, lambda file: picture.figure.savefig(file, format="png"))


class _Picture:
    """A table of panels: a row for what comes in and one for each block."""

    def __init__(
        self,
        image: Image.Image,
        observation: Observation,
        points: Sequence[Point],
        blocks: Sequence[int],
    ) -> None:
        self.image, self.observation, self.points = image, observation, points
        self.blocks, self.frame = blocks, observation.frame
        self.names = observation.level_names
        self.samples_width = max(len(points), MIN_SAMPLES_WIDTH)
        units = len(self.names) + self.samples_width + GATES_WIDTH + SWITCHES_WIDTH
        self.panel = (WIDTH - 2 * MARGIN - 3 * GAP) / units
        aspect = image.height / image.width
        self.row = min(max((self.panel - BETWEEN) * aspect, MIN_ROW), MAX_ROW)
        self.height = TOP + (self.row + BETWEEN) * (len(blocks) + 1) + AFTER_INPUT + BOTTOM
        self.figure = Figure(figsize=(WIDTH, self.height), dpi=DPI)
        FigureCanvasAgg(self.figure)
        self.left = MARGIN

    def headline(self, title: str) -> None:
        self._write(MARGIN, 0.2, title, fontsize=17, fontweight="bold")

    def _write(self, x: float, y: float, text: str, **options: Any) -> None:
        """Text at inches from the upper left corner."""
        self.figure.text(x / WIDTH, 1 - y / self.height, text, va="top", **options)

    def _axes(self, x: float, row: int, width: float) -> Axes:
        """A panel at x inches in a row of the table; its width in inches too."""
        top = TOP + row * (self.row + BETWEEN) + (AFTER_INPUT if row else 0)
        bottom = self.height - top - self.row
        return self.figure.add_axes(
            (x / WIDTH, bottom / self.height, width / WIDTH, self.row / self.height)
        )

    def _group(self, texts: tuple[str, str], panels: float) -> float:
        """Heads the next group of columns; returns its left edge in inches."""
        left = self.left
        self._write(left, 0.7, texts[0], fontsize=14, fontweight="bold")
        self._write(left, 1.0, texts[1], fontsize=11, color="0.25", linespacing=1.15)
        self.left += panels * self.panel + GAP
        return left

    def _show(self, axes: Axes, pixels: Any, **options: Any) -> Any:
        """Pixels of any resolution, in the image's coordinates."""
        figure.bare(axes)
        width, height = self.frame.image
        return axes.imshow(pixels, extent=(0, width, height, 0), **options)

    def energies(self) -> None:
        head, text = ENERGY_TEXT
        boxes = BOXES_TEXT if any(point.box is not None for point in self.points) else ""
        left = self._group((head, text + boxes), len(self.names))
        first = [level.energy_input for level in self.observation.blocks[0]]
        rows = [("input", first)]
        for block in self.blocks:
            maps = [level.energy_output for level in self.observation.blocks[block]]
            rows.append((f"block {block + 1}", maps))
        norm = LogNorm(*figure.ENERGY_RANGE, clip=True)
        for i, (name, maps) in enumerate(rows):
            for level, energy in enumerate(maps):
                axes = self._axes(left + level * self.panel, i, self.panel - BETWEEN)
                stride = self.frame.strides[level]
                values = figure.energy_at_pixels(energy, stride, self.frame.resized)
                shown = self._show(axes, values, cmap="viridis", norm=norm)
                for point in self.points:
                    if point.level == level:
                        self._box(axes, point, "white", 1.0)
                if level == 0:
                    axes.set_ylabel(name, fontsize=13, fontweight="bold")
                if i == 0:
                    axes.set_title(f"{self.names[level]}, stride {stride}")
        bar = self._axes(left + len(self.names) * self.panel - 0.04, 0, 0.1)
        figure.mark_energies(self.figure.colorbar(shown, cax=bar, extend="both"))

    def samples(self) -> None:
        head, text = SAMPLES_TEXT
        detected = all(point.box is not None for point in self.points)
        made = ", which made the detection" if detected else ""
        left = self._group((head, text.format(made=made)), self.samples_width)
        width = self.panel - BETWEEN
        self._photograph(left)
        grey = np.asarray(self.image.convert("L"), dtype=np.float64) / 255
        for i, point in enumerate(self.points):
            found = [self.observation.samples(block, point) for block in self.blocks]
            row, column = self.frame.to_level(point.level, point.x, point.y)
            centre = self.frame.to_image(point.level, torch.tensor([[row, column]]))[0].tolist()
            half = self._window(found, point.level, centre)
            for j, samples in enumerate(found):
                axes = self._axes(left + i * self.panel, j + 1, width)
                # Paler and darker than the marks.
                self._show(axes, 0.25 + 0.5 * grey, cmap="gray", vmin=0, vmax=1)
                self._marks(axes, samples)
                axes.set_facecolor("0.9")
                self._box(axes, point, "white", 1.0)
                self._cross(axes, *centre)
                weights = torch.cat([s.weights for s in samples.values()])
                if "spatial" not in self.observation.attentions:
                    self._note(axes, "off: the regular grid", 0.1)
                elif (outside := int((weights == 0).sum())) > 0:
                    self._note(axes, f"{outside} of {len(weights)} outside", 0.1)
                tall = half * self.row / width
                axes.set_xlim(_within(centre[0], half, self.frame.image[0]))
                axes.set_ylim(_within(centre[1], tall, self.frame.image[1])[::-1])
                if j == 0:
                    axes.set_title(f"{i + 1}: {point.text}, {self.names[point.level]}", fontsize=11)

    def _window(self, found: list[dict[str, Samples]], level: int, centre: list[float]) -> float:
        """Half the width of the close-up that holds what all blocks read."""
        samples = [s for branches in found for s in branches.values()]
        places = [self.frame.to_image(s.level, s.positions) for s in samples]
        distances = (torch.cat(places) - torch.tensor(centre)).abs().amax(1)
        order = distances.argsort()
        share = torch.cat([s.weights for s in samples])[order].cumsum(0)
        last = int((share < SHOWN * share[-1]).sum())
        farthest = float(distances[order[min(last, len(order) - 1)]])
        width, height = self.frame.image
        least = MIN_WINDOW * self.frame.strides[level] * width / self.frame.resized[0]
        return min(max(1.1 * farthest, least), max(width, height) / 2)

    def _marks(self, axes: Axes, samples: dict[str, Samples]) -> None:
        for name, (colour, marker) in BRANCH_MARKS.items():
            if name not in samples:
                continue
            read = samples[name]
            start, end = (
                self.frame.to_image(read.level, p).numpy() for p in (read.grid, read.positions)
            )
            strong = read.weights.numpy() > 0
            lines = np.stack([start, end], axis=1)[strong]
            axes.add_collection(LineCollection(list(lines), colors=colour, lw=1.1, alpha=0.9))
            axes.scatter(
                end[strong, 0],
                end[strong, 1],
                s=MAX_DOT * read.weights.numpy()[strong],
                c=colour,
                marker=marker,
                ec="black",
                lw=0.6,
                zorder=3,
            )

    def _box(self, axes: Axes, point: Point, colour: str, width: float) -> None:
        if point.box is not None:
            x, y, right, bottom = point.box
            axes.add_patch(
                Rectangle((x, y), right - x, bottom - y, fill=False, ec=colour, lw=width)
            )

    def _cross(self, axes: Axes, x: float, y: float) -> None:
        for colour, width in (("black", 4), ("white", 2)):
            axes.plot(x, y, "x", color=colour, ms=10, mew=width, zorder=4)

    def _photograph(self, left: float) -> None:
        """The image with its points in the first row, and the legend beside it."""
        most = 0.5 * self.samples_width * self.panel
        drawn = min(most, self.row * self.image.width / self.image.height)
        axes = self._axes(left, 0, drawn)
        self._show(axes, self.image)
        for number, point in enumerate(self.points, 1):
            self._box(axes, point, "black", 3.5)
            self._box(axes, point, figure.YELLOW, 1.8)
            if point.box is None:
                self._cross(axes, point.x, point.y)
            axes.annotate(
                str(number),
                (point.x, point.y) if point.box is None else point.box[:2],
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=11,
                fontweight="bold",
                bbox={"facecolor": figure.YELLOW, "pad": 1.5},
            )
        handles = [
            Line2D([], [], ls="", marker=mark, color=colour, mec="black", ms=9,
                   label=f"{name}: {figure.BRANCH_SOURCES[name]}")
            for name, (colour, mark) in reversed(BRANCH_MARKS.items())
        ]  # fmt: skip
        self.figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=((left + drawn + 0.1) / WIDTH, 1 - TOP / self.height),
            frameon=False,
            borderpad=0,
        )

    def _off(self, axes: Axes, text: str) -> None:
        """A panel with nothing but a text."""
        figure.bare(axes)
        axes.set_facecolor("0.93")
        self._note(axes, text, 0.5)

    def _note(self, axes: Axes, text: str, height: float) -> None:
        axes.text(
            0.5,
            height,
            text,
            transform=axes.transAxes,
            ha="center",
            va="center",
            color="0.3",
            fontsize=10,
            zorder=5,
            bbox={"facecolor": "0.93", "edgecolor": "none", "pad": 2},
        )

    def _bar(self, left: float, width: float, shown: Any, texts: str) -> None:
        """A colour bar at the foot of the first row, with its meaning above."""
        axes = self._axes(left, 0, width)
        axes.set_axis_off()
        inset = axes.inset_axes((0, 0.14, 1, 0.09))
        self.figure.colorbar(shown, cax=inset, orientation="horizontal")
        inset.set_title(texts, fontsize=11)

    def gates(self) -> None:
        left = self._group(GATES_TEXT, GATES_WIDTH)
        width = GATES_WIDTH * self.panel - 0.3
        left += 0.3
        blocks = [self.observation.blocks[block] for block in self.blocks]
        gates = np.array(
            [[[x.gates.get(n, np.nan) for n in BRANCHES] for x in block] for block in blocks]
        )
        most = max(0.6, float(np.nanmax(gates)))
        for i, values in enumerate(gates):
            axes = self._axes(left, i + 1, width)
            if "scale" not in self.observation.attentions:
                self._off(axes, "off: every gate is 1")
                continue
            shown = axes.imshow(values, cmap="cividis", vmin=MIN_GATE, vmax=most, aspect="auto")
            axes.set_facecolor("0.85")
            axes.set_yticks(range(len(values)), self.names)
            axes.set_xticks(range(len(BRANCHES)), BRANCHES if i == 0 else [""] * len(BRANCHES))
            axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
            figure.write_values(axes, values, (MIN_GATE + most) / 2)
        if "scale" in self.observation.attentions:
            self._bar(left, width, shown, "gate; 0.50 is the least\n(grey: no such level)")

    def switches(self) -> None:
        left = self._group(SWITCHES_TEXT, SWITCHES_WIDTH)
        left += 0.1
        width = SWITCHES_WIDTH * self.panel - 0.45
        off = "task" not in self.observation.attentions
        for i, block in enumerate(self.blocks):
            axes = self._axes(left, i + 1, width)
            if off:
                after = "after the RoI pooling:\nnot on the pyramid"
                self._off(
                    axes, after if self.observation.task_elsewhere else "off: no dynamic ReLU"
                )
                continue
            shares = np.stack([level.share.numpy() for level in self.observation.blocks[block]])
            order = shares.mean(0).argsort()[::-1]
            shown = axes.imshow(
                shares[:, order], cmap="cividis", vmin=0, vmax=1, aspect="auto",
                interpolation="nearest",
            )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks(range(len(shares)), self.names)
            axes.tick_params(length=0)
            for level, share in enumerate(shares.mean(1)):
                axes.text(1.02, level, f"{share:.0%}", transform=axes.get_yaxis_transform(),
                          va="center")  # fmt: skip
        if not off:
            text = "share of the pixels with a1 x + b1\n(channels by their mean; at the right: all)"
            self._bar(left, width, shown, text)


def _within(centre: float, half: float, side: int) -> tuple[float, float]:
    """A window of the image's side, moved into the image if it is no larger."""
    centre = min(max(centre, half), side - half) if 2 * half <= side else centre
    return centre - half, centre + half

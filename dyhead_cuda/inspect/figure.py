"""The demo's picture: where a head looks on a photograph, and what its three attentions do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image
from torch import Tensor

from dyhead_cuda.inspect.record import BRANCHES, LevelRecord
from dyhead_cuda.pyramid import TAPS

FINEST_STRIDE = 8  # of P3, in pixels of the photograph
POINTS = 4
WINDOW = 4.2  # half the side of a close-up, in pixels of P3
MAX_DOT_AREA = 240.0  # in square points, for a modulation of 1
ENERGY_LEVELS = 3
ENERGY_RANGE = (0.4, 2.5)
ENERGY_TICKS = (0.4, 0.6, 1, 1.6, 2.5)
ENERGY_TITLES = ("input", "after spatial and scale", "after task attention")
BRANCH_SOURCES = {"low": "the finer level", "mid": "its own level", "high": "the coarser level"}
MAX_ANNOTATED_BLOCKS = 8

# Of Okabe and Ito's palette, which every kind of colour vision tells apart.
ORANGE, SKY, YELLOW, PURPLE = "#E69F00", "#56B4E9", "#F0E442", "#CC79A7"
BLUE, VERMILION = "#0072B2", "#D55E00"
POINT_COLOURS = (ORANGE, SKY, YELLOW, PURPLE)
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "figure.dpi": 100,
}


def draw(
    photograph: Image.Image, blocks: Sequence[Sequence[LevelRecord]], path: Path, caption: str
) -> None:
    """Write the picture: the photograph, where the head looks on it, and its three attentions.

    Args:
        photograph: RGB, as the backbone saw it (without the padding).
        blocks: per block, per level from P3 on, what
            :func:`dyhead_cuda.inspect.record.describe` returned.
        path: the PNG to write.
        caption: the headline.

    Example:
        >>> import tempfile, torch, dyhead_cuda
        >>> from dyhead_cuda.inspect import record
        >>> head = dyhead_cuda.DyHead(16, 16, num_blocks=1)
        >>> levels = [torch.randn(1, 16, side, side) for side in (16, 8, 4)]
        >>> path = Path(tempfile.mkdtemp(), "head.png")
        >>> draw(Image.new("RGB", (128, 128)), record.record(head, levels), path, "A new head")
        >>> path.stat().st_size > 0
        True
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(18, 14), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(caption, fontsize=17, fontweight="bold")
        top, bottom = _split(figure, (0.84, 1), vertical=True)
        left, right = _split(top, (1, 1.25))
        points = interest_points(photograph, POINTS, round(2 * WINDOW * FINEST_STRIDE))
        _draw_photograph(left, photograph, points)
        _draw_samples(right, photograph, blocks, points)
        left, right = _split(bottom, (1.25, 1))
        _draw_energies(left, photograph, blocks[0])
        upper, lower = _split(right, (1.15, 1), vertical=True)
        _draw_gates(upper, blocks)
        _draw_slopes(lower, blocks)
        figure.savefig(path, format="png")


def _split(
    figure: Figure | SubFigure, ratios: tuple[float, float], vertical: bool = False
) -> tuple[SubFigure, SubFigure]:
    parts: Any = (
        figure.subfigures(2, 1, height_ratios=ratios, hspace=0.02)
        if vertical
        else figure.subfigures(1, 2, width_ratios=ratios, wspace=0.02)
    )
    return parts[0], parts[1]


def interest_points(image: Image.Image, count: int, margin: int) -> list[tuple[int, int]]:
    """Up to ``count`` places (x, y) with strong gradients, spread over the image.

    Args:
        image: the photograph.
        count: how many places to find.
        margin: pixels to keep from the border, where there is room for that.

    Returns:
        The places, from left to right.

    Example:
        >>> image = Image.new("L", (64, 64))
        >>> image.paste(255, (30, 30, 40, 40))
        >>> len(interest_points(image, 2, 4))
        2
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    rows, columns = np.gradient(grey)
    radius = max(1, margin // 3)
    strength = np.hypot(rows, columns)
    strength = _box_mean(strength, radius)
    height, width = grey.shape
    inner_y, inner_x = (min(margin, (side - 1) // 2) for side in (height, width))
    allowed = np.zeros_like(strength, dtype=bool)
    allowed[inner_y : height - inner_y, inner_x : width - inner_x] = True
    strength = np.where(allowed, strength, -1.0)
    apart = 0.45 * max(height, width) / np.sqrt(count)
    y, x = np.mgrid[:height, :width]
    points: list[tuple[int, int]] = []
    while len(points) < count and strength.max() >= 0:
        best_y, best_x = np.unravel_index(strength.argmax(), strength.shape)
        points.append((int(best_x), int(best_y)))
        strength[np.hypot(y - best_y, x - best_x) < apart] = -1.0
    return sorted(points)


def _box_mean(values: np.ndarray, radius: int) -> np.ndarray:
    side = 2 * radius + 1
    padded = np.pad(values, radius, mode="edge").cumsum(0).cumsum(1)
    padded = np.pad(padded, ((1, 0), (1, 0)))
    sums = padded[side:, side:] - padded[:-side, side:] - padded[side:, :-side]
    return (sums + padded[:-side, :-side]) / side**2


def bare(axes: Axes) -> None:
    """Take the ticks away.

    Args:
        axes: changed in place.

    Example:
        >>> axes = Figure().subplots()
        >>> bare(axes)
        >>> len(axes.get_xticks())
        0
    """
    axes.set_xticks([])
    axes.set_yticks([])


def _explain(figure: SubFigure, title: str, text: str) -> None:
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(text, fontsize=11, color="0.25", x=0.01, ha="left")


def _draw_photograph(
    figure: SubFigure, photograph: Image.Image, points: Sequence[tuple[int, int]]
) -> None:
    _explain(figure, "The photograph", "Boxes: the close-ups on the right.")
    axes = figure.subplots()
    axes.imshow(photograph)
    axes.set_anchor("N")
    bare(axes)
    half = WINDOW * FINEST_STRIDE
    for i, ((x, y), colour) in enumerate(zip(points, POINT_COLOURS, strict=False), 1):
        corner = (x - half, y - half)
        axes.add_patch(Rectangle(corner, 2 * half, 2 * half, fill=False, ec=colour, lw=2.5))
        axes.annotate(
            str(i),
            (max(corner[0], 0), max(corner[1], 0)),
            xytext=(1, 4),
            textcoords="offset points",
            fontsize=13,
            fontweight="bold",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 2},
        )


def _draw_samples(
    figure: SubFigure,
    photograph: Image.Image,
    blocks: Sequence[Sequence[LevelRecord]],
    points: Sequence[tuple[int, int]],
) -> None:
    _explain(
        figure,
        "Spatial attention: where one pixel of P3 samples its own level",
        "Arrows: from the regular 3 x 3 grid to the deformed positions. Area of a dot: modulation.",
    )
    shown = sorted({0, len(blocks) - 1})
    grid = figure.subplots(len(shown), len(points), squeeze=False)
    for row, block in zip(grid, shown, strict=True):
        for i, (axes, point) in enumerate(zip(row, points, strict=True)):
            axes.imshow(photograph)
            _draw_taps(axes, blocks[block][0], point)
            bare(axes)
            for spine in axes.spines.values():
                spine.set(color=POINT_COLOURS[i], linewidth=3)
            axes.set_title(f"{i + 1}, block {block + 1}")


def _draw_taps(axes: Axes, level: LevelRecord, point: tuple[int, int]) -> None:
    stride = FINEST_STRIDE
    # Pixel i of a level is centred on pixel i * stride: all convolutions pad symmetrically.
    column, row = (round(v / stride) for v in point)
    taps = np.arange(TAPS)
    grid = stride * np.stack([column + taps % 3 - 1, row + taps // 3 - 1], axis=1)
    deformed = grid + stride * level.offset[:, :, row, column].double().numpy()[:, ::-1]
    areas = MAX_DOT_AREA * level.modulation[:, row, column].double().numpy()
    axes.scatter(grid[:, 0], grid[:, 1], s=24, marker="s", c="white", ec="black", lw=0.8, zorder=6)
    for start, end, area in zip(grid, deformed, areas, strict=True):
        for colour, width in (("black", 3.2), ("white", 1.6)):
            arrow = FancyArrowPatch(
                (start[0], start[1]),
                (end[0], end[1]),
                arrowstyle="->,head_length=3,head_width=2",
                shrinkA=0,
                shrinkB=np.sqrt(area / np.pi),
                color=colour,
                lw=width,
                zorder=4 if colour == "black" else 5,
            )
            axes.add_patch(arrow)
    axes.scatter(deformed[:, 0], deformed[:, 1], s=areas, c=VERMILION, ec="white", lw=1, zorder=7)
    half = WINDOW * stride
    axes.set_xlim(column * stride - half, column * stride + half)
    axes.set_ylim(row * stride + half, row * stride - half)


def _draw_energies(
    figure: SubFigure, photograph: Image.Image, levels: Sequence[LevelRecord]
) -> None:
    _explain(
        figure,
        "What the attentions do to the features: their energy in block 1",
        "Energy: L2 norm over the channels, divided by its median over the photograph.",
    )
    grid = figure.subplots(ENERGY_LEVELS, 3)
    for index, row in enumerate(grid):
        level = levels[index]
        maps = (level.energy_input, level.energy_combined, level.energy_output)
        for axes, energy, title in zip(row, maps, ENERGY_TITLES, strict=True):
            shown = axes.imshow(
                energy_at_pixels(energy, FINEST_STRIDE * 2**index, photograph.size),
                cmap="viridis",
                norm=LogNorm(*ENERGY_RANGE, clip=True),
            )
            bare(axes)
            # Beside a tall photograph room is left, so that its titles keep apart.
            room = max(0.0, 1.1 * photograph.height - photograph.width) / 2
            axes.set_xlim(-room, photograph.width + room)
            axes.spines[:].set_visible(room == 0)
            axes.set_title(f"P{index + 3}, {title}", loc="center")
    mark_energies(figure.colorbar(shown, ax=grid, shrink=0.6, extend="both", pad=0.01))


def mark_energies(bar: Colorbar) -> None:
    """Write plain numbers beside a colour bar of energies.

    Args:
        bar: changed in place.

    Example:
        >>> figure = Figure()
        >>> image = figure.subplots().imshow([[1.0]], norm=LogNorm(*ENERGY_RANGE))
        >>> bar = figure.colorbar(image)
        >>> mark_energies(bar)
        >>> list(bar.get_ticks()) == list(ENERGY_TICKS)
        True
    """
    bar.set_ticks(ENERGY_TICKS, labels=[f"{t:g}" for t in ENERGY_TICKS])
    bar.minorticks_off()


def energy_at_pixels(energy: Tensor, stride: int, image: tuple[int, int]) -> np.ndarray:
    """A level's energy at the pixels of what the backbone read, relative to its median there.

    Args:
        energy: [H, W] of any floating type, the L2 norm over the channels.
        stride: of the level, in pixels.
        image: (width, height) in pixels, without the padding.

    Returns:
        [height, width] float64; ones where the median is zero.

    Example:
        >>> import torch
        >>> energy_at_pixels(torch.ones(2, 3), 8, (20, 12)).shape
        (12, 20)
    """
    height, width = energy.shape
    # With align_corners the pixels i * stride keep their values; beyond the last the edge repeats.
    size = ((height - 1) * stride + 1, (width - 1) * stride + 1)
    large = F.interpolate(energy[None, None], size, mode="bilinear", align_corners=True)
    large = F.pad(large, (0, stride - 1, 0, stride - 1), mode="replicate")[0, 0]
    values = large[: image[1], : image[0]].double().numpy()
    median = np.median(values)
    return values / median if median > 0 else np.ones_like(values)


def _draw_gates(figure: SubFigure, blocks: Sequence[Sequence[LevelRecord]]) -> None:
    _explain(
        figure,
        "Scale attention: the gate of each branch, by level and block",
        "0.50: the smallest gate there is, from relu and hsigmoid. Grey: no such level.",
    )
    grid = figure.subplots(1, len(BRANCHES), sharey=True)
    by_block = [[[x.gates.get(n, np.nan) for x in block] for block in blocks] for n in BRANCHES]
    gates = np.array(by_block).transpose(0, 2, 1)  # [branches, levels, blocks]
    low, high = 0.5, max(0.6, float(np.nanmax(gates)))
    for axes, name, values in zip(grid, BRANCHES, gates, strict=True):
        shown = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        axes.set_facecolor("0.85")
        axes.set_title(f"{name}: {BRANCH_SOURCES[name]}")
        axes.set_yticks(range(len(values)), [f"P{i + 3}" for i in range(len(values))])
        axes.set_xlabel("block")
        ticks = range(0, len(blocks), -(-len(blocks) // 10))
        axes.set_xticks(ticks, [str(block + 1) for block in ticks])
        if len(blocks) <= MAX_ANNOTATED_BLOCKS:
            write_values(axes, values, (low + high) / 2)
    figure.colorbar(shown, ax=grid, pad=0.01)


def write_values(axes: Axes, values: np.ndarray, middle: float) -> None:
    """Write the numbers of a cividis heat map into it; none for NaN.

    Args:
        axes: changed in place.
        values: [rows, columns], as they were drawn.
        middle: numbers below it are white, the others black.

    Example:
        >>> axes = Figure().subplots()
        >>> write_values(axes, np.array([[0.5, np.nan]]), 0.6)
        >>> [text.get_text() for text in axes.texts]
        ['.50']
    """
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value < middle else "black"
            text = f"{value:.2f}".removeprefix("0")
            axes.text(j, i, text, ha="center", va="center", fontsize=10, color=colour)


def _draw_slopes(figure: SubFigure, blocks: Sequence[Sequence[LevelRecord]]) -> None:
    _explain(
        figure,
        f"Task attention: the two slopes of every channel, block {len(blocks)}",
        "out = max(a1 x + b1, a2 x + b2); a1 = 1 and a2 = 0 is a ReLU. Height: number of channels.",
    )
    axes = figure.subplots()
    levels = blocks[-1]
    edges = np.linspace(-1, 2, 121)
    for i, level in enumerate(levels):
        base = len(levels) - 1 - i
        for values, colour, name in zip(
            level.coefficients[::2], (ORANGE, BLUE), ("a1", "a2"), strict=True
        ):
            counts, _ = np.histogram(values.double().numpy(), edges)
            axes.stairs(
                base + 0.85 * counts / max(counts.max(), 1),
                edges,
                baseline=base,
                fill=True,
                color=colour,
                alpha=0.8,
                label=name if i == 0 else None,
            )
        axes.axhline(base, color="0.6", lw=0.7)
    axes.set_yticks(range(len(levels)), [f"P{len(levels) + 2 - i}" for i in range(len(levels))])
    axes.set_xlim(-1, 2)
    axes.set_ylim(-0.05, len(levels))
    axes.legend(loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)

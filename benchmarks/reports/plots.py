"""Plots of a run: ratios to peers, roofline, scaling with pixels and batch, memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.cases.problems import BOTH, DIRECTIONS, FORWARD, OURS
from benchmarks.cases.shapes import SHAPE_SETS
from benchmarks.machine import one_line
from benchmarks.reports.results import OK, Results, Row, ratio, read

# Of Okabe and Ito's palette, which every kind of colour vision tells apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "figure.dpi": 90, "legend.fontsize": 8}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
FIRST = (OURS, FORWARD)
MARKERS = {FORWARD: "o", BOTH: "s"}
LINES = {FORWARD: "-", BOTH: "--"}

Draw = Callable[[Results, Figure], bool]


def run(arguments: argparse.Namespace) -> int:
    """Draws the plots of files beside them; returns the exit status."""
    for path in arguments.files:
        for written in draw_all(read(path), path.with_suffix("")):
            print(written)
    return 0


def draw_all(results: Results, stem: Path) -> list[Path]:
    """Writes ``STEM-NAME.png`` for every plot that there is data for; returns what was written."""
    written = []
    for name, draw in PLOTS.items():
        with mpl.rc_context(STYLE):
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            if not draw(results, figure):
                continue
            figure.supxlabel(_caption(results), fontsize=7, color="0.35")
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, format="png")
            written.append(path)
    return written


def _caption(results: Results) -> str:
    facts = results.environment
    return f"{one_line(facts)}; commit {facts['commit'] or 'unknown'}, {str(facts['date'])[:10]}"


def _what(row: Row) -> str:
    blocks = f" x{row.blocks}" if row.blocks > 1 else ""
    return f"{row.case}{blocks}, {row.shapes}, b{row.batch}, {row.precision}"


def _bars(
    axes: Axes,
    labels: Sequence[str],
    values: dict[str, list[float | None]],
    colour_of: dict[str, str],
    form: str,
) -> None:
    """Horizontal bars: a group for each label, a bar in it for each name that has a value."""
    position, ticks = 0.0, []
    for i, _ in enumerate(labels):
        present = [(name, numbers[i]) for name, numbers in values.items() if numbers[i] is not None]
        ticks.append(position + (len(present) - 1) / 2)
        for name, value in present:
            assert value is not None
            axes.barh(position, value, 0.9, color=colour_of[name])
            axes.text(value, position, f" {value:{form}}", va="center", fontsize=7)
            position += 1
        position += 0.8
    axes.set_yticks(ticks, labels)
    axes.set_ylim(position, -1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1, 2, 5) if high < 1e3 * low else (1,)  # leave room for the numbers
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _groups(results: Results, direction: str) -> list[dict[str, Row]]:
    """Groups in which ours and at least one peer were measured."""
    found = []
    for group in results.groups():
        right = {name: row for name, row in group.items() if row.status == OK}
        if OURS in right and len(right) > 1 and right[OURS].direction == direction:
            found.append(right)
    return found


def _figure_of_bars(
    results: Results,
    figure: Figure,
    value: Callable[[Row, Row], float | None],
    title: str,
    form: str,
    with_ours: bool,
) -> bool:
    """One panel for each direction; ``value`` of a row and of ours."""
    panels = {d: groups for d in DIRECTIONS if (groups := _groups(results, d))}
    if not panels:
        return False
    bars = max(sum(len(g) for g in groups) + len(groups) for groups in panels.values())
    figure.set_size_inches(5.5 * len(panels), max(3.0, 1.0 + 0.15 * bars))
    every = [group for groups in panels.values() for group in groups]
    names = dict.fromkeys(n for group in every for n in group if with_ours or n != OURS)
    colour_of = dict(zip(names, COLOURS, strict=False))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (direction, groups) in zip(grid, panels.items(), strict=True):
        values = {
            name: [value(g[name], g[OURS]) if name in g else None for g in groups]
            for name in colour_of
        }
        _bars(axes, [_what(g[OURS]) for g in groups], values, colour_of, form)
        axes.set_title(f"{direction}: {title}")
    handles = [Patch(color=colour, label=name) for name, colour in colour_of.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return True


def ratios(results: Results, figure: Figure) -> bool:
    def value(row: Row, own: Row) -> float | None:
        return ratio(row, own)

    drawn = _figure_of_bars(results, figure, value, f"x {OURS}", ".2g", with_ours=False)
    for axes in figure.axes:
        axes.axvline(1, color="0.3", lw=0.8)
    return drawn


def memory(results: Results, figure: Figure) -> bool:
    def value(row: Row, own: Row) -> float | None:
        measured = row.memory is not None and own.memory is not None
        return max(row.memory, 1) / 2**20 if measured and row.memory is not None else None

    if all(row.memory is None for row in results.rows):
        return False
    return _figure_of_bars(results, figure, value, "peak memory in MiB", ".3g", with_ours=True)


def roofline(results: Results, figure: Figure) -> bool:
    """TFLOP/s over FLOP per byte, under the rates of a large copy and of products."""
    rates = results.rates
    if results.ceilings is None or not rates:
        return False
    copy = results.ceilings["copy_gb_per_s"]
    rows = [r for r in results.rows if r.implementation in (OURS, "torchvision")]
    # A row that ran in another precision repeats the row of that precision.
    shown = [r for r in rows if r.tflop_per_s and r.ran_in == r.precision and r.ran_in in rates]
    if not shown:
        return False
    figure.set_size_inches(8, 5)
    axes = figure.subplots()
    intensities = [r.flops / r.bytes for r in shown]
    x = np.geomspace(min(*intensities, 1) / 2, max(intensities) * 4, 200)
    colour_of = dict(zip(rates, COLOURS, strict=False))
    for precision, rate in rates.items():
        axes.plot(x, np.minimum(x * copy / 1e3, rate), color=colour_of[precision], lw=1.2)
        axes.text(x[-1], rate, f" {precision}", color=colour_of[precision], va="center", fontsize=8)
    _rates(axes, shown, colour_of)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s", xlabel="FLOP per byte that must move")
    axes.set_title("roofline measured in the same run, one point for each case")
    axes.legend(loc="lower right")
    axes.margins(x=0.1)
    return True


def _rates(axes: Axes, rows: Sequence[Row], colour_of: dict[str, str]) -> None:
    """A point for each row, its case below ours, and the meaning of the markers."""
    for row in rows:
        assert row.tflop_per_s is not None
        colour = colour_of[row.ran_in]
        axes.plot(
            row.flops / row.bytes,
            row.tflop_per_s,
            MARKERS[row.direction],
            color=colour,
            mfc=colour if row.implementation == OURS else "none",
            ms=5,
        )
    named = {r.case: r for r in reversed(rows) if (r.implementation, r.direction) == FIRST}
    for i, row in enumerate(sorted(named.values(), key=lambda r: r.flops / r.bytes)):
        place = row.flops / row.bytes, row.tflop_per_s
        below = (0, -14 - 9 * (i % 3))
        axes.annotate(row.case, place, below, textcoords="offset points", fontsize=7, ha="center")
    for marker, face, text in (
        (MARKERS[FORWARD], "0.3", f"{OURS}, {FORWARD}"),
        (MARKERS[BOTH], "0.3", f"{OURS}, {BOTH}"),
        (MARKERS[FORWARD], "none", "torchvision, layer by layer"),
    ):
        axes.plot([], [], marker, color="0.3", mfc=face, label=text)


def scaling(results: Results, figure: Figure) -> bool:
    """Time of a block per pixel of all images, over pixels and over batch."""
    blocks = _rows_of_blocks(results)
    if not blocks:
        return False
    single = [r for r in blocks if r.batch == 1]
    figure.set_size_inches(9, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    _lines(left, single, _pixels)
    _lines(right, [r for r in blocks if r.shapes == "glip"], lambda r: r.batch)
    left.set(xscale="log", yscale="log", xlabel="thousand pixels of all levels, batch 1")
    left.set(ylabel="nanoseconds per pixel")
    right.set(xscale="log", xlabel="batch, 800x1344 image")
    sizes = sorted({_pixels(r) for r in single})
    _ticks(left, sizes, [f"{size / 1e3:.0f}" for size in sizes])
    batches = sorted({r.batch for r in blocks})
    _ticks(right, batches, [str(batch) for batch in batches])
    left.yaxis.set_major_formatter(PLAIN)
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_title(f"block, {blocks[0].precision}: flat is linear")
    left.legend(loc="best")
    return True


def _rows_of_blocks(results: Results) -> list[Row]:
    """The blocks in the precision that was measured most; none if there are too few sizes."""
    measured = [r for r in results.rows if r.status == OK and r.case == "block" and r.time]
    precisions = [r.precision for r in measured if r.implementation == OURS]
    if not precisions or len({(r.shapes, r.batch) for r in measured}) < 3:
        return []
    precision = max(precisions, key=precisions.count)
    return [r for r in measured if r.precision == precision and r.shapes in SHAPE_SETS]


def _lines(axes: Axes, rows: Sequence[Row], place: Callable[[Row], int]) -> None:
    """Time per pixel over ``place``: a line for each implementation and direction."""
    measured = {r.implementation for r in rows}
    names = [name for name in (OURS, "torchvision") if name in measured]
    for name, colour in zip(names, COLOURS, strict=False):
        for direction in DIRECTIONS:
            chosen = [r for r in rows if (r.implementation, r.direction) == (name, direction)]
            points = sorted((place(r), _per_pixel(r)) for r in chosen)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    marker=MARKERS[direction],
                    ms=4,
                    color=colour,
                    ls=LINES[direction],
                    label=f"{name}, {direction}",
                )


def _ticks(axes: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xticks(places, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def _pixels(row: Row) -> int:
    return row.batch * SHAPE_SETS[row.shapes].pixels


def _per_pixel(row: Row) -> float:
    assert row.time is not None
    return row.time.median / _pixels(row) * 1e9


PLOTS: dict[str, Draw] = {
    "ratios": ratios,
    "roofline": roofline,
    "scaling": scaling,
    "memory": memory,
}

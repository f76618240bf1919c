"""Plots of a study: AP against cost, learning curves, and the tables as points with spread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.reports.plots import COLOURS, STYLE
from benchmarks.study.results import Study, mean_and_spread, values
from benchmarks.study.variants import TABLES, VARIANTS

PLOTS = {"cost": "AP against cost", "curves": "learning curves", "tables": "AP of every run"}
_MARKERS = "os^Dv"


def draw_all(study: Study, folder: Path) -> list[Path]:
    """Writes ``NAME.png`` into a folder for each of :data:`PLOTS` that has something to show.

    Returns what was written.
    """
    written = []
    for name in PLOTS:
        with mpl.rc_context(STYLE):
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            if not _DRAW[name](study, figure):
                continue
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], format="png")
    return written


def _heads(study: Study) -> list[tuple[str, str, str]]:
    """The rows of the first table that have runs, each with its colour and marker."""
    styles = [(colour, marker) for marker in _MARKERS for colour in COLOURS]
    pairs = zip(TABLES["heads"].variants, styles, strict=False)
    return [(name, *style) for name, style in pairs if study.runs[name]]


def _percents(study: Study, name: str) -> list[float]:
    return [100 * value for value in values(study, name).values()]


def _cost(study: Study, figure: Figure) -> bool:
    heads = [head for head in _heads(study) if head[0] in study.costs]
    if not heads:
        return False
    figure.set_size_inches(9, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    measures = (("gflops", "GFLOPs of one image"), ("step_ms", "training step, ms"))
    for axes, (measure, title) in zip(panels, measures, strict=True):
        for name, colour, marker in heads:
            mean, spread = mean_and_spread(_percents(study, name))
            axes.errorbar(
                study.costs[name][measure],
                mean,
                0 if np.isnan(spread) else spread,
                fmt=marker,
                color=colour,
                capsize=3,
                label=VARIANTS[name].label,
            )
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("AP, mean and spread of the seeds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return True


def _curves(study: Study, figure: Figure) -> bool:
    heads = _heads(study)
    if not heads:
        return False
    figure.set_size_inches(7, 5)
    axes = figure.subplots()
    for name, colour, marker in heads:
        curves = np.array([run["curve"] for run in study.runs[name]], float)  # [seeds, n, 2]
        steps, ap = curves[0, :, 0], 100 * curves[:, :, 1]
        axes.plot(steps, ap.mean(0), f"{marker}-", color=colour, ms=4, label=VARIANTS[name].label)
        axes.fill_between(steps, ap.min(0), ap.max(0), color=colour, alpha=0.15, lw=0)
    axes.set_xlabel("step")
    axes.set_ylabel("AP; band: least to most of the seeds")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return True


def _tables(study: Study, figure: Figure) -> bool:
    if not any(study.runs.values()):
        return False
    sizes = [len(table.variants) for table in TABLES.values()]
    figure.set_size_inches(7, 1 + 0.36 * sum(sizes))
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=sizes)
    for axes, table in zip(panels[:, 0], TABLES.values(), strict=True):
        for row, name in enumerate(table.variants):
            numbers = _percents(study, name)
            axes.plot(numbers, [row] * len(numbers), "o", color=COLOURS[0], alpha=0.5)
            axes.plot(mean_and_spread(numbers)[0], row, "|", color="black", ms=14)
        axes.set_yticks(range(len(table.variants)), [VARIANTS[n].label for n in table.variants])
        axes.set_ylim(len(table.variants) - 0.5, -0.5)
        axes.set_title(table.title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("AP of each seed; line: mean")
    return True


_DRAW: dict[str, Callable[[Study, Figure], bool]] = {
    "cost": _cost,
    "curves": _curves,
    "tables": _tables,
}

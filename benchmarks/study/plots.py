"""Plots of a study: AP against cost, learning curves, and the tables as points with spread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.machine import one_line
from benchmarks.reports.plots import COLOURS, STYLE
from benchmarks.study.results import Study, mean_and_spread, values
from benchmarks.study.variants import TABLES

PLOTS = {"cost": "AP against cost", "curves": "learning curves", "tables": "AP of every run"}


def draw_all(study: Study, stem: Path) -> list[Path]:
    """Writes ``STEM-NAME.png`` for each of :data:`PLOTS`; returns what was written."""
    facts = study["environment"]
    caption = f"{one_line(facts)}; commit {facts['commit'] or 'unknown'}, {facts['date'][:10]}"
    written = []
    for name in PLOTS:
        with mpl.rc_context(STYLE):
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            if not _DRAW[name](study, figure):
                continue
            figure.supxlabel(caption, fontsize=7, color="0.35")
            written.append(stem.with_name(f"{stem.name}-{name}.png"))
            figure.savefig(written[-1], format="png")
    return written


def _depths(study: Study) -> list[str]:
    return list(TABLES["depth"].variants) if "depth" in study["tables"] else []


def _cost(study: Study, figure: Figure) -> bool:
    names = _depths(study)
    if not names:
        return False
    figure.set_size_inches(9, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    measures = (("gflops", "GFLOPs of one image"), ("step_ms", "training step, ms"))
    for axes, (measure, title) in zip(panels, measures, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            facts = study["variants"][name]
            mean, spread = mean_and_spread([100 * v for v in values(study, name)])
            axes.errorbar(
                facts[measure],
                mean,
                0 if np.isnan(spread) else spread,
                fmt="s" if name == "plain" else "o",
                color=colour,
                capsize=3,
                label=facts["label"],
            )
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("AP")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return True


def _curves(study: Study, figure: Figure) -> bool:
    names = _depths(study)
    if not names:
        return False
    figure.set_size_inches(6, 4)
    axes = figure.subplots()
    for name, colour in zip(names, COLOURS, strict=False):
        facts = study["variants"][name]
        curves = np.array([run["curve"] for run in facts["runs"]], float)  # [seeds, n, 2]
        steps, ap = curves[0, :, 0], 100 * curves[:, :, 1]
        axes.plot(steps, ap.mean(0), "o-", color=colour, ms=3, label=facts["label"])
        axes.fill_between(steps, ap.min(0), ap.max(0), color=colour, alpha=0.15, lw=0)
    axes.set_xlabel("step")
    axes.set_ylabel("AP; band: least to most of the seeds")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return True


def _tables(study: Study, figure: Figure) -> bool:
    tables = study["tables"]
    sizes = [len(TABLES[table].variants) for table in tables]
    figure.set_size_inches(6, 1 + 0.4 * sum(sizes))
    panels = figure.subplots(len(tables), 1, sharex=True, squeeze=False, height_ratios=sizes)
    for axes, table in zip(panels[:, 0], tables, strict=True):
        names = TABLES[table].variants
        for row, name in enumerate(names):
            numbers = [100 * v for v in values(study, name)]
            axes.plot(numbers, [row] * len(numbers), "o", color=COLOURS[0], alpha=0.5)
            axes.plot(np.mean(numbers), row, "|", color="black", ms=14)
        axes.set_yticks(range(len(names)), [study["variants"][name]["label"] for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(TABLES[table].title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("AP of each seed; line: mean")
    return True


_DRAW: dict[str, Callable[[Study, Figure], bool]] = {
    "cost": _cost,
    "curves": _curves,
    "tables": _tables,
}

"""A study as Markdown: the section of the README."""

from __future__ import annotations

import math
import os
from pathlib import Path

from benchmarks.machine import one_line
from benchmarks.readme import table
from benchmarks.study.plots import PLOTS
from benchmarks.study.results import Study, difference, mean_and_spread, values
from benchmarks.study.variants import TABLES


def points(mean: float, spread: float, signed: bool = False) -> str:
    """Fractions as percents: "31.2 ± 0.4"."""
    text = f"{100 * mean:{'+' if signed else ''}.1f}"
    return text if math.isnan(spread) else f"{text} ± {100 * spread:.1f}"


def section(study: Study, path: Path, base: Path) -> str:
    """The tables of a study.

    Args:
        study: what to show.
        path: its file; plots lie beside it.
        base: the directory that links are relative to.
    """
    facts, setup = study["environment"], study["setup"]
    seeds = len(next(iter(study["variants"].values()))["runs"])
    lines = [
        f"{one_line(facts)}, {str(facts['date'])[:10]}, commit {facts['commit'] or 'unknown'}:",
        "",
        f"    {facts['command']}",
        "",
        f"{setup['detector'].upper()} on {setup['backbone']} from random weights, "
        f"{setup['channels']} channels, levels P{setup['first_level']} to "
        f"P{setup['last_level']}. Every row is trained "
        f"on {setup['images']} scenes of {setup['size']} pixels with digits from "
        f"{setup['min_height']} pixels, in {setup['steps']} steps of {setup['batch_size']} (AdamW, "
        f"lr {setup['lr']:g}), and measured on {setup['val_images']} others: AP in percent, mean ± "
        f"standard deviation over {seeds} seeds; differences between runs of the same seed. Times "
        "are of one batch.",
    ]
    for name in study["tables"]:
        lines += ["", _table(study, name)]
    links = [("all numbers", path)]
    links += [(title, path.with_name(f"{path.stem}-{name}.png")) for name, title in PLOTS.items()]
    shown = [
        f"[{title}]({os.path.relpath(file, base).replace(os.sep, '/')})"
        for title, file in links
        if file.is_file()
    ]
    return "\n".join([*lines, "", ", ".join(shown)])


def _table(study: Study, name: str) -> str:
    variants = TABLES[name].variants
    base = variants[0]
    label = study["variants"][base]["label"]
    header = [
        TABLES[name].title,
        "AP",
        f"AP - {label}",
        "AP50",
        "AP75",
        "APs",
        "parameters",
        "GFLOPs",
        "step",
        "prediction",
    ]
    rows = []
    for variant in variants:
        facts = study["variants"][variant]
        cells = [facts["label"], points(*mean_and_spread(values(study, variant)))]
        cells.append("" if variant == base else points(*difference(study, variant, base), True))
        for metric in ("AP50", "AP75", "APs"):
            cells.append(points(mean_and_spread(values(study, variant, metric))[0], math.nan))
        cells += [
            f"{facts['parameters'] / 1e6:.2f} M",
            f"{facts['gflops']:.2f}",
            f"{facts['step_ms']:.0f} ms",
            f"{facts['prediction_ms']:.0f} ms",
        ]
        rows.append(cells)
    return table(header, rows)

"""A study as Markdown: the section of docs/study.md."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.machine import one_line
from benchmarks.readme import table
from benchmarks.study.plots import PLOTS
from benchmarks.study.results import (
    METRICS,
    Study,
    difference,
    mean_and_spread,
    search_ap,
    values,
)
from benchmarks.study.variants import TABLES, VARIANTS

NONE = "-"  # not known yet


def points(mean: float, spread: float = math.nan, signed: bool = False) -> str:
    """Fractions as percents: "31.2 ± 0.4"."""
    if math.isnan(mean):
        return NONE
    text = f"{100 * mean:{'+' if signed else ''}.1f}"
    return text if math.isnan(spread) else f"{text} ± {100 * spread:.1f}"


def section(study: Study, folder: Path, base: Path, seeds: int) -> str:
    """The tables of a study.

    Args:
        study: what to show.
        folder: of its results, with the plots.
        base: the directory that links are relative to.
        seeds: of each row in the end.
    """
    paragraphs = [_progress(study, seeds), _setup(study), *_machines(study)]
    if study.ignored:
        paragraphs.append(
            f"Ignored, as they are of another setup: {len(study.ignored)} results "
            f"({_few(study.ignored)})."
        )
    paragraphs += [_results(study, name) for name in TABLES]
    paragraphs += [_searches(study), _costs(study), *_positives(study)]
    links = [(title, folder / f"{name}.png") for name, title in PLOTS.items()]
    shown = [
        f"[{title}]({os.path.relpath(path, base).replace(os.sep, '/')})"
        for title, path in links
        if path.exists()
    ]
    return "\n\n".join([*paragraphs, *filter(None, [", ".join(shown)])])


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _progress(study: Study, seeds: int) -> str:
    planned = seeds * len(VARIANTS)
    done = sum(min(seeds, len(runs)) for runs in study.runs.values())
    tuned = sum(rate is not None for rate in study.rates.values())
    if done == planned:
        return f"All {planned} runs are here: {seeds} seeds of each of {len(VARIANTS)} rows."
    return (
        f"**Runs are being added**: {done} of {planned} are here ({seeds} seeds of each of "
        f"{len(VARIANTS)} rows); learning rates are chosen for {tuned} of the rows. What is not "
        f'known yet is "{NONE}".'
    )


def _setup(study: Study) -> str:
    setup = study.setup
    start = f"weights {setup.weights}" if setup.weights else "random weights"
    smallest, largest = setup.heights
    return (
        f"ATSS on {setup.backbone} ({start}; its learning rate is "
        f"{setup.body_lr:g} of the others'), {setup.channels} channels, levels "
        f"P{setup.first_level} to P{setup.last_level}. Every row is trained on {setup.images} "
        f"scenes of {setup.size} pixels with objects of {smallest:g} to {largest:g} pixels on "
        f"{setup.background}, in {setup.steps} steps of {setup.batch_size} images, and measured "
        f"on {setup.val_images} others: AP in percent, mean ± standard deviation over the seeds; "
        "differences are between runs of the same seed. *Agnostic AP* takes all classes as one. "
        "*Class accuracy* is the share of the anchors that the assigner picks for the objects "
        "whose highest logit is that of the right class."
    )


def _machines(study: Study) -> list[str]:
    records = [record for runs in study.runs.values() for record in runs]
    records += [record for found in study.searches.values() for record in found.values()]
    if not records:
        return []
    machines = Counter(record["machine"] for record in records)
    commits = dict.fromkeys(record["commit"] or "unknown" for record in records)
    where = "; ".join(f"{count} on {machine}" for machine, count in machines.most_common())
    return [f"Trainings, with those of the search: {where}. Commits: {', '.join(commits)}."]


def _results(study: Study, name: str) -> str:
    variants = TABLES[name].variants
    base = variants[0]
    header = [TABLES[name].title, "seeds"]
    for metric in METRICS:
        header.append(metric)
        if metric == "AP":
            header.append(f"AP - {VARIANTS[base].label}")
    rows = []
    for variant in variants:
        cells = [VARIANTS[variant].label, str(len(study.runs[variant]) or NONE)]
        for metric in METRICS:
            mean, spread = mean_and_spread(list(values(study, variant, metric).values()))
            cells.append(points(mean, spread))
            if metric == "AP":
                compared = difference(study, variant, base)
                cells.append("" if variant == base else points(*compared, signed=True))
        rows.append(cells)
    return table(header, rows)


def _searches(study: Study) -> str:
    setup = study.setup
    intro = (
        f"The learning rate of every row is the best of the same {len(setup.rates)}, each tried "
        f"in one training of {setup.search_steps} steps with a seed of its own; AP of each:"
    )
    header = ["Learning rate", *(f"{rate:g}" for rate in setup.rates), "taken"]
    rows = []
    for name, variant in VARIANTS.items():
        found, taken = study.searches[name], study.rates[name]
        cells = [variant.label]
        for rate in setup.rates:
            failed = rate in found and "failed" in found[rate]
            ap = search_ap(found[rate]) if rate in found else None
            cells.append("failed" if failed else points(math.nan if ap is None else ap))
        rows.append([*cells, NONE if taken is None else f"{taken:g}"])
    return f"{intro}\n\n{table(header, rows)}"


def _costs(study: Study) -> str:
    where = "" if study.machine is None else f", on {one_line(study.machine)}"
    intro = f"What a row costs: times are of a batch of {study.setup.batch_size} images{where}."
    rows = []
    for name, variant in VARIANTS.items():
        if name in study.costs:
            costs = study.costs[name]
            cells = [
                f"{costs['gflops']:.2f}",
                f"{costs['parameters'] / 1e6:.2f} M",
                f"{costs['step_ms']:.0f} ms",
                f"{costs['prediction_ms']:.0f} ms",
            ]
        else:
            cells = [NONE] * 4
        rows.append([variant.label, *cells])
    header = ["Cost", "GFLOPs of an image", "parameters", "training step", "prediction"]
    return f"{intro}\n\n{table(header, rows)}"


def _positives(study: Study) -> Iterable[str]:
    for runs in study.runs.values():
        for record in runs:
            counts = record["positives"]
            listed = ", ".join(f"{level['anchors']} on {name}" for name, level in counts.items())
            yield (
                f"Anchors that the assigner picks in the {study.setup.val_images} scenes to "
                f"measure on, the same in every run: {listed}."
            )
            return

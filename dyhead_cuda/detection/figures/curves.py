"""The curve of a run: its loss and its average precision by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dyhead_cuda.detection.files import write_atomically

# Of Okabe and Ito's palette, which every kind of colour vision tells apart.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
COLOURS = {"AP": BLUE, "AP50": ORANGE, "AP75": GREEN}


def draw(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the lines of a log into a PNG file.

    Args:
        records: as :meth:`dyhead_cuda.detection.training.runs.RunFolder.records` gives them.
        path: the file.
        title: above the curves.

    Raises:
        WriteError: it could not be written.
    """
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    steps = [record for record in records if record.get("loss") is not None]
    numbers = [record["step"] for record in steps]
    losses = np.array([record["loss"] for record in steps], np.float64)
    left.plot(numbers, losses, color=BLUE, alpha=0.3, lw=0.8, label="each step")
    window = max(1, len(losses) // 25)
    if len(losses) > window > 1:
        means = np.convolve(losses, np.full(window, 1 / window), "valid")
        left.plot(numbers[window - 1 :], means, color=BLUE, label=f"mean of {window} steps")
    left.set_ylabel("loss")
    left.legend()
    evaluations = [record for record in records if "evaluation" in record]
    for name, colour in COLOURS.items():
        values = [record["evaluation"]["summary"].get(name) for record in evaluations]
        percent = [math.nan if value is None else 100 * value for value in values]
        where = [record["step"] for record in evaluations]
        right.plot(where, percent, color=colour, marker="o", ms=3, label=name)
    right.set_ylabel("average precision on val, %")
    right.set_ylim(bottom=0)
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))

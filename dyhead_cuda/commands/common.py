"""What the commands share: errors, warnings, tables."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Column, Table

from dyhead_cuda.detection.evaluation import Metrics
from dyhead_cuda.detection.files import out_of_memory
from dyhead_cuda.detection.training.checkpoint_file import one_line

MEANINGS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "small objects, up to 32 x 32 pixels",
    "APm": "medium objects, up to 96 x 96 pixels",
    "APl": "large objects",
    "AR1": "average recall with 1 detection per image",
    "AR10": "with 10",
    "AR100": "with 100",
}


def check_names(paths: Sequence[Path]) -> None:
    """Raise ValueError if the files written for two images would have the same name."""
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise ValueError(
                f"expected images of different names, got {seen[path.stem]} and {path}, whose "
                "pictures would be one file; use two commands with different --out"
            )
        seen[path.stem] = path


def check_outputs(paths: Sequence[Path], out: Path, suffixes: Sequence[str]) -> None:
    """Raise ValueError if a file written to ``out`` would replace one of those that are read."""
    for path in paths:
        for suffix in suffixes:
            written = out / f"{path.stem}{suffix}"
            if written.exists() and path.exists() and written.samefile(path):
                raise ValueError(f"expected --out as another folder than that of {path}")


def is_first() -> bool:
    """Whether this is the one process that prints, of those that torchrun started."""
    return int(os.environ.get("RANK", 0)) == 0


def fail(error: Exception | str, status: int = 2) -> int:
    """Prints one error line; returns the exit status."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/] {escape(str(error))}"
    )
    return status


def fail_for_memory(error: Exception, advice: str, status: int = 2) -> int:
    """Prints one error line where memory was not enough, and raises any other error again."""
    if not out_of_memory(error):
        raise error
    return fail(f"there is not enough memory: {one_line(error)}; {advice}", status)


@contextmanager
def warnings_shown(console: Console) -> Iterator[None]:
    """Shows warnings of the library on the console, above a progress bar if there is one.

    A process whose console is quiet shows only what ends it.
    """
    logger = logging.getLogger("dyhead_cuda.detection")
    level = logging.WARNING
    if console.quiet:
        level, console = logging.CRITICAL, Console(stderr=True, highlight=False, soft_wrap=True)
    handler = RichHandler(level, console, show_time=False, show_path=False)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def print_metrics(console: Console, metrics: Metrics, title: str) -> None:
    """Prints the tables of the summary, of each class, and of keypoints if there are any."""
    table = Table("metric", Column("%", justify="right"), "meaning")
    for name, value in metrics.summary.items():
        table.add_row(name, _percent(value), MEANINGS[name])
    console.print(escape(title), table, sep="\n")
    _print_column(console, metrics.per_class, "class", "AP of each class")
    if metrics.keypoints is not None:
        _print_column(console, metrics.keypoints, "metric", "keypoints")


def _print_column(console: Console, values: Mapping[str, float], what: str, title: str) -> None:
    table = Table(what, Column("%", justify="right"))
    for name, value in values.items():
        table.add_row(escape(name), _percent(value))
    console.print(title, table, sep="\n")


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"

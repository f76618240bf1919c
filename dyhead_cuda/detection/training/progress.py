"""Shows a training as it goes: a bar in a terminal, lines elsewhere, TensorBoard.

All take the records that :func:`~dyhead_cuda.detection.training.trainer.train` gives its
listeners.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dyhead_cuda.detection.files import writing

Record = dict[str, Any]
Listener = Callable[[Record], None]

LINE_INTERVAL_S = 10.0  # between lines where there is no terminal
SMOOTHED_STEPS = 20  # that the shown loss and speed are averaged over
UNTIMED_STEPS, TIMED_STEPS = 1, 3  # the first takes longer: memory, threads, kernels
LONG_S = 30 * 60.0  # a run that takes longer is worth a word at its start


class _State:
    """What is shown: means over the last steps, and the last AP."""

    def __init__(self) -> None:
        self._last: deque[tuple[float, float]] = deque(maxlen=SMOOTHED_STEPS)
        self.ap = math.nan

    def take(self, record: Record) -> None:
        if "loss" in record:
            self._last.append((record["loss"], record["images_per_second"]))
        if "evaluation" in record:
            self.ap = record["evaluation"]["summary"]["AP"]

    def __str__(self) -> str:
        losses, speeds = zip(*self._last, strict=True) if self._last else ((math.nan,), (math.nan,))
        loss, speed = sum(losses) / len(losses), sum(speeds) / len(speeds)
        ap = "-" if math.isnan(self.ap) else f"{100 * self.ap:.1f}"
        return f"loss {loss:.3f}  AP {ap}  {speed:.1f} images/s"


@contextmanager
def shown(console: Console, steps: int) -> Iterator[Listener]:
    """A listener that shows steps of ``steps``, loss, AP in percent, speed and the time left."""
    if not console.is_terminal:
        yield _lines(console, steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    state = _State()
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        task = progress.add_task("training", total=steps, state=str(state))

        def show(record: Record) -> None:
            state.take(record)
            what = "training"
            if "evaluated" in record:
                what = f"evaluation of image {record['evaluated']} of {record['to_evaluate']}"
            progress.update(task, completed=record["step"], description=what, state=str(state))

        yield show


def _lines(console: Console, steps: int) -> Listener:
    state = _State()
    started = last = -math.inf
    first_step = 0

    def show(record: Record) -> None:
        nonlocal started, last, first_step
        state.take(record)
        now = time.monotonic()
        if started == -math.inf:
            started, first_step = now, record["step"]
        ended = record["step"] == steps and "loss" in record
        if "evaluated" in record or not (
            ended or "evaluation" in record or now - last >= LINE_INTERVAL_S
        ):
            return
        last = now
        left = "?"
        if record["step"] > first_step:
            seconds = (now - started) / (record["step"] - first_step) * (steps - record["step"])
            left = str(timedelta(seconds=round(seconds)))
        console.print(f"step {record['step']}/{steps}  {state}  left {left}", soft_wrap=True)

    return show


def foretold(console: Console, steps: int, advice: str) -> Listener:
    """A listener that says once, after the first few steps, how long the others will take.

    It says nothing where that is less than half an hour.

    Args:
        console: to print on.
        steps: in all.
        advice: the end of the line: on what, and what shortens it.
    """
    times: list[float] = []

    def listen(record: Record) -> None:
        if "seconds" not in record or len(times) == UNTIMED_STEPS + TIMED_STEPS:
            return
        times.append(record["seconds"])
        if len(times) < UNTIMED_STEPS + TIMED_STEPS:
            return
        left = steps - record["step"]
        seconds = left * statistics.median(times[UNTIMED_STEPS:])
        if seconds > LONG_S:
            line = f"the other {left} steps will take about {_spoken(seconds)} {advice}"
            console.print(line, soft_wrap=True)

    return listen


def _spoken(seconds: float) -> str:
    """A time as people say it, such as "22 hours"."""
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"


@contextmanager
def tensorboard(folder: Path) -> Iterator[Listener]:
    """A listener that writes TensorBoard events into ``folder``.

    Raises:
        ModuleNotFoundError: the package tensorboard is not installed.
        WriteError: from the listener or at the end: the events could not be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    with _said_once(), writing(folder), ExitStack() as stack:
        writer: Any = None

        def write(record: Record) -> None:
            with writing(folder):
                add(record)

        def add(record: Record) -> None:
            nonlocal writer
            step = record["step"]
            if writer is None:
                # Hides steps of an earlier process that came after its last checkpoint.
                writer = stack.enter_context(SummaryWriter(str(folder), purge_step=step))
            for name in ("loss", "lr", "grad_norm", "images_per_second"):
                if name in record:
                    writer.add_scalar(f"train/{name}", record[name], step)
            for name, value in record.get("losses", {}).items():
                writer.add_scalar(f"train/{name}", value, step)
            for name, value in record.get("evaluation", {}).get("summary", {}).items():
                writer.add_scalar(f"val/{name}", value, step)

        yield write


@contextmanager
def _said_once() -> Iterator[None]:
    """Without the traceback that TensorBoard's own thread prints of an error of the system.

    It keeps the error for the next call of the writer, too.
    """
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        own = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (own and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before

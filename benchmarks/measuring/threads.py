"""``python -m benchmarks threads``: how a block would scale to more threads than this CPU has.

A CPU kernel is a few lists of tasks; a thread that is free takes the next task of the list. So the
library is built once more, to record how long each task takes, and runs a block on one thread, with
the lists that it makes for a number of threads. Working these lists off on as many threads, in the
order in which the library does, gives the time that they would need if each were as fast as the
one. What runs outside the lists counts as work for one thread. Times are those that the process had
a processor, so that other programs do not disturb; what threads take from each other, such as
memory, is not part of them.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import readme
from benchmarks.cases.shapes import SHAPE_SETS
from benchmarks.machine import environment, one_line
from dyhead_cuda import DyHeadBlock
from dyhead_cuda.commands.common import fail

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "instrumented" / "tasks"
THREADS = (2, 4, 8, 16, 32, 64)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEATS = 5  # of a block, of which the fastest counts


@dataclass(frozen=True)
class TaskList:
    """What one call of ``parallel_tasks`` did on one thread, in nanoseconds.

    Attributes:
        begin, end: of the clock of the process.
        scratch: that each thread makes once.
        tasks: how long each took, in the order in which they are handed out.
    """

    begin: int
    end: int
    scratch: int
    tasks: tuple[int, ...]

    @classmethod
    def read(cls, line: str) -> TaskList:
        """One line of csrc/cpu/task_record.h."""
        begin, end, scratch, *tasks = (int(word) for word in line.split())
        return cls(begin, end, scratch, tuple(tasks))

    def time_on(self, threads: int) -> int:
        """Nanoseconds on so many threads, each as fast as the one.

        Example:
            >>> TaskList(0, 12, 0, (3, 3, 6)).time_on(2)
            9
        """
        free = [self.scratch] * min(threads, len(self.tasks))
        for task in self.tasks:
            heapq.heapreplace(free, free[0] + task)
        return max(free)


@dataclass(frozen=True)
class Recording:
    """A block on one thread.

    Attributes:
        total: nanoseconds.
        lists: of tasks, one after the other.
    """

    total: int
    lists: tuple[TaskList, ...]

    @property
    def alone(self) -> int:
        """Nanoseconds outside the lists."""
        return self.total - sum(each.end - each.begin for each in self.lists)

    def time_on(self, threads: int, alone: int) -> int:
        """Nanoseconds on so many threads, if nothing else limits them.

        Args:
            threads: for which the lists were made.
            alone: nanoseconds outside the lists.
        """
        return alone + sum(each.time_on(threads) for each in self.lists)


def record(shapes: str, precision: str, backward: bool, threads: int, file: Path) -> Recording:
    """Runs a block in this process, whose library records into ``file`` and uses one thread.

    Args:
        shapes: a name of ``SHAPE_SETS``.
        precision: a name of ``PRECISIONS``.
        backward: whether gradients are part of it.
        threads: for which the library makes its lists.
        file: that the environment variable DYHEAD_TASK_RECORD names.

    Raises:
        RuntimeError: nothing was recorded, as by a library that was not built for it.
    """
    chosen, dtype = SHAPE_SETS[shapes], PRECISIONS[precision]
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    block = DyHeadBlock(
        chosen.channels,
        chosen.channels,
        num_groups=chosen.num_groups,
        memory_format=torch.channels_last,  # as between the blocks of a head: nothing is copied
    )
    block.to(dtype).requires_grad_(backward)
    levels = [
        torch.randn(1, chosen.channels, *size, dtype=dtype)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_(backward)
        for size in chosen.levels
    ]
    gradients = [torch.ones_like(x) for x in levels]
    best: Recording | None = None
    for _ in range(REPEATS):
        file.write_text("")
        begin = time.process_time_ns()
        outputs = block(levels)
        if backward:
            torch.autograd.backward(outputs, gradients)
        total = time.process_time_ns() - begin
        lists = tuple(TaskList.read(line) for line in file.read_text().splitlines())
        if not lists:
            raise RuntimeError(
                f"expected the library to record its tasks in {file}, but it wrote none; build it "
                "with DYHEAD_INSTRUMENT=tasks and set DYHEAD_LIBRARY_DIR and DYHEAD_TASK_RECORD"
            )
        if best is None or total < best.total:
            best = Recording(total, lists)
    assert best is not None
    return best


def _recorded(shapes: str) -> list[dict[str, Any]]:
    """The rows, from a process with a library of its own."""
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    settings = {"DYHEAD_INSTRUMENT": "tasks", "DYHEAD_REQUIRE": "cpu"}
    subprocess.run(build, cwd=ROOT, env={**os.environ, **settings}, check=True, stdout=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tasks")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.measuring.threads", shapes, str(file)],
            cwd=ROOT,
            env={
                **os.environ,
                "DYHEAD_LIBRARY_DIR": str(LIBRARIES),
                "DYHEAD_TASK_RECORD": str(file),
                "OMP_WAIT_POLICY": "passive",  # torch's own threads, which wait meanwhile
            },
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def rows(shapes: str, file: Path) -> list[dict[str, Any]]:
    """What each precision and direction would gain; see :func:`record`."""
    found = []
    for precision in PRECISIONS:
        for backward in (False, True):
            one = record(shapes, precision, backward, 1, file)
            times = {
                n: record(shapes, precision, backward, n, file).time_on(n, one.alone)
                for n in THREADS
            }
            found.append(
                {
                    "precision": precision,
                    "backward": backward,
                    "milliseconds": one.total / 1e6,
                    "alone": one.alone / one.total,
                    "speedup": {str(n): one.total / times[n] for n in THREADS},
                }
            )
    return found


def section(data: dict[str, Any]) -> str:
    """The table of a results file, in Markdown."""
    facts = data["environment"]
    lines = [
        [
            row["precision"],
            "forward+backward" if row["backward"] else "forward",
            f"{row['milliseconds']:.0f} ms",
            f"{row['alone']:.1%}",
            *(f"{value:.1f} x" for value in row["speedup"].values()),
        ]
        for row in data["rows"]
    ]
    header = ["precision", "direction", "one thread", "outside the lists"]
    return "\n\n".join(
        [
            f"{one_line(facts)}, {facts['date'][:10]}, commit {facts['commit']}:",
            f"    {facts['command']}",
            readme.table([*header, *(f"{n} threads" for n in THREADS)], lines),
        ]
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes; with ``--report`` only writes the table of ``--json`` as it is."""
    path: Path = arguments.json
    if not arguments.report:
        try:
            rows_found = _recorded(arguments.shapes)
        except subprocess.CalledProcessError as error:  # which has said why on stderr
            return fail(f"nothing was measured: {shlex.join(map(str, error.cmd))} failed")
        data = {
            "environment": environment(sys.argv[1:], torch.device("cpu")),
            "shapes": arguments.shapes,
            "rows": rows_found,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")
    text = section(json.loads(path.read_text()))
    if arguments.write is None:
        print(text)
    else:
        readme.write_section(arguments.write, readme.THREADS, text)
    return 0


def main(argv: Sequence[str]) -> None:
    """Writes the rows as JSON; for :func:`run`, in a process of its own."""
    shapes, file = argv
    print(json.dumps(rows(shapes, Path(file))))


if __name__ == "__main__":
    main(sys.argv[1:])

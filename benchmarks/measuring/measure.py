"""``python -m benchmarks``: measures, shows results as they arrive, and writes them."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine
from benchmarks.cases import peers
from benchmarks.cases.problems import OURS
from benchmarks.measuring import selection
from benchmarks.measuring.runner import Options, run_entries
from benchmarks.measuring.selection import Entry, Selection
from benchmarks.measuring.timing import COLD, GRAPH, QUICK, WARM, usual_effort
from benchmarks.reports import results, tables
from benchmarks.reports.plots import draw_all
from benchmarks.reports.results import FAILED, WRONG, Results, Row
from dyhead_cuda import library

WIDTH = 150  # of tables in characters where there is no terminal


def selection_of(arguments: argparse.Namespace) -> Selection:
    """The selection that the options ask for."""
    return Selection(
        tuple(arguments.only),
        tuple(arguments.shapes),
        tuple(arguments.batch),
        tuple(arguments.blocks),
        tuple(arguments.dtype),
        tuple(arguments.direction),
        None if arguments.peers is None else tuple(arguments.peers),
        arguments.quick,
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmarks.

    Returns:
        0; 1 if a result is wrong or ours did not run.
    """
    wanted = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        arguments.parser.error(
            f"--device cuda needs a GPU, but torch {torch.__version__} sees none"
        )
    if arguments.plots is not None:
        arguments.plots.mkdir(parents=True, exist_ok=True)
    device = torch.device(wanted)
    options = Options(
        device,
        QUICK if arguments.quick else usual_effort(device),
        _methods(arguments, device),
        time.monotonic() + arguments.seconds if arguments.seconds else float("inf"),
    )
    entries = selection.entries(selection_of(arguments), device.type)
    console = Console(stderr=arguments.json == "-", highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    found = Results(machine.environment(arguments.command_line, device))
    console.print(
        escape(f"{machine.one_line(found.environment)}\n$ {found.environment['command']}")
    )
    for note in _notes(device):
        console.print(f"[yellow]note:[/] {escape(note)}")
    _run(entries, options, found, console, arguments)
    return _conclude(found, console, arguments)


def _methods(arguments: argparse.Namespace, device: torch.device) -> tuple[str, ...]:
    usual = [COLD, WARM] if device.type == "cuda" else [WARM]
    graph = [GRAPH] * (arguments.graph and device.type == "cuda")
    return (*(arguments.cache or usual), *graph)


def _notes(device: torch.device) -> list[str]:
    notes = []
    if not library.loaded(device.type):
        notes.append(f"no {device.type} library: {library.reason(device.type)}")
    for name in ("torchvision", "mmcv"):
        if name not in peers.deform_convs():
            notes.append(f"{name} is not installed, so it is left out")
    if device.type == "cpu" and os.getloadavg()[0] > 0.5:
        notes.append(f"other programs are running (load {os.getloadavg()[0]:.1f})")
    return notes


def _run(
    entries: Sequence[Entry],
    options: Options,
    found: Results,
    console: Console,
    arguments: argparse.Namespace,
) -> None:
    asked = [precision for entry in entries for precision in entry.precisions]
    precisions = list(dict.fromkeys([*asked, "float32"]))  # peers fall back to float32
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not shown) as progress:
        task = progress.add_task("roofline", total=len(entries))

        def announce(what: str) -> None:
            progress.update(task, description=escape(what))

        found.ceilings = machine.ceilings(
            list(dict.fromkeys([*precisions, "float32"])),
            options.device,
            options.effort,
            arguments.quick,
        )
        console.print(escape(tables.ceilings_line(found)))
        current: Entry | None = None
        rows: list[Row] = []
        for entry, row in run_entries(entries, options, announce):
            if current is not None and entry is not current:
                console.print(tables.table_of(current.setting.title, found, rows))
                progress.advance(task)
                rows = []
            current = entry
            rows.append(row)
            found.rows.append(row)
            if arguments.json not in (None, "-"):
                results.write(
                    found, arguments.json
                )  # keep what was measured if this is interrupted
        if current is not None:
            console.print(tables.table_of(current.setting.title, found, rows))
        progress.advance(task)


def _conclude(found: Results, console: Console, arguments: argparse.Namespace) -> int:
    if arguments.json == "-":
        results.write(found, "-")
    if arguments.plots is not None:
        for path in draw_all(found, arguments.plots / found.environment["device"]):
            console.print(escape(str(path)))
    bad = [r for r in found.rows if r.status == WRONG or (r.status == FAILED and _is_ours(r))]
    for row in bad:
        console.print(
            f"[bold red]{row.status}:[/] "
            + escape(f"{row.implementation}, {row.case}, {row.precision}: {row.remark}")
        )
    return int(bool(bad))


def _is_ours(row: Row) -> bool:
    return row.implementation.startswith(OURS)

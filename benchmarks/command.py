"""Measures, and works with results: all of ``python -m benchmarks`` but ``study``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import compare, machine, peers, plans, readme, report, results, tables, targets
from benchmarks.heads import CASES
from benchmarks.plans import Entry, Selection
from benchmarks.plots import draw_all
from benchmarks.precisions import PRECISIONS
from benchmarks.problems import DIRECTIONS, FAMILIES, OURS
from benchmarks.results import FAILED, WRONG, Results, ResultsError, Row
from benchmarks.runner import Options, run_plan
from benchmarks.shapes import SHAPE_SETS
from benchmarks.timing import COLD, GRAPH, QUICK, WARM, usual_effort
from dyhead_cuda import library
from dyhead_cuda.commands.options import integer

WIDTH = 150  # of tables that no terminal limits


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """Adds the options of a measurement; returns the group of actions, to add more."""
    parser.set_defaults(run=run, action=_measure, parser=parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=[], help="cases")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPE_SETS), default=[])
    parser.add_argument("--batch", nargs="+", type=integer(1), default=[])
    parser.add_argument("--blocks", nargs="+", type=integer(1), default=[], help="of whole heads")
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), default=[])
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=[])
    parser.add_argument(
        "--peers", nargs="*", choices=FAMILIES, help="what to run beside ours; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two runs: does it work?")
    parser.add_argument("--graph", action="store_true", help="also replay CUDA graphs")
    parser.add_argument(
        "--cache",
        nargs="+",
        choices=[WARM, COLD],
        help="of the processor, before a run; default: warm, on a GPU both",
    )
    parser.add_argument(
        "--seconds",
        type=integer(1),
        help="start nothing after that long; it is reported as skipped",
    )
    parser.add_argument("--json", type=_target, metavar="FILE", help="write results; - for stdout")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="draw them there")
    actions = parser.add_subparsers(title="with results", metavar="ACTION", prog=parser.prog)

    comparison = actions.add_parser("compare", help="two runs: exit status 1 if ours became slower")
    comparison.set_defaults(action=_compare)
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    comparison.add_argument("--threshold", type=float, default=0.05, help="default: %(default)s")
    comparison.add_argument("--force", action="store_true", help="even if of different machines")

    markdown = actions.add_parser("report", help="a Markdown table of results")
    markdown.set_defaults(action=_report)
    markdown.add_argument("files", nargs="+", type=Path)
    markdown.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help=f"between {' and '.join(readme.markers(report.SECTION))} there",
    )

    drawing = actions.add_parser("plot", help="the plots of results, beside the file")
    drawing.set_defaults(action=_plot)
    drawing.add_argument("files", nargs="+", type=Path)

    goals = actions.add_parser("targets", help="which of the project's targets a GPU run reached")
    goals.set_defaults(action=_targets)
    goals.add_argument("files", nargs="+", type=Path)
    return actions


def _target(text: str) -> str:
    # Told now, not after the minutes that the measurements take.
    if text != "-" and not Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing directory, got {text!r}")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmarks or the action asked for.

    Returns:
        0; 1 if a result is wrong, ours did not run or a comparison found a regression; 2 if files
        cannot be used.
    """
    action: Callable[[argparse.Namespace], int] = arguments.action
    try:
        return action(arguments)
    except (ResultsError, readme.SectionError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _compare(arguments: argparse.Namespace) -> int:
    before, after = results.read(arguments.before), results.read(arguments.after)
    if not arguments.force:
        compare.same_machine(before, after)
    changes = compare.compare(before, after, arguments.threshold)
    print(compare.format_changes(changes))
    return int(any(change.regression for change in changes))


def _report(arguments: argparse.Namespace) -> int:
    target: Path | None = arguments.write
    if target is None:
        print(report.section(arguments.files, Path.cwd()))
        return 0
    new = report.section(arguments.files, target.resolve().parent)
    readme.write_section(target, report.SECTION, new)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    for path in arguments.files:
        for written in draw_all(results.read(path), path.with_suffix("")):
            print(written)
    return 0


def _targets(arguments: argparse.Namespace) -> int:
    print(targets.format_verdicts(targets.judge([results.read(path) for path in arguments.files])))
    return 0


def selection_of(arguments: argparse.Namespace) -> Selection:
    """What the options choose."""
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


def _measure(arguments: argparse.Namespace) -> int:
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
    plan = plans.entries(selection_of(arguments), device.type)
    console = Console(stderr=arguments.json == "-", highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    found = Results(machine.environment(arguments.command_line, device))
    console.print(
        escape(f"{machine.one_line(found.environment)}\n$ {found.environment['command']}")
    )
    for note in _notes(device):
        console.print(f"[yellow]note:[/] {escape(note)}")
    _run(plan, options, found, console, arguments)
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
    plan: Sequence[Entry],
    options: Options,
    found: Results,
    console: Console,
    arguments: argparse.Namespace,
) -> None:
    asked = [precision for entry in plan for precision in entry.precisions]
    precisions = list(dict.fromkeys([*asked, "float32"]))  # what others fall back to, too
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not shown) as progress:
        task = progress.add_task("roofline", total=len(plan))

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
        for entry, row in run_plan(plan, options, announce):
            if current is not None and entry is not current:
                console.print(tables.table_of(current.setting.title, found, rows))
                progress.advance(task)
                rows = []
            current = entry
            rows.append(row)
            found.rows.append(row)
            if arguments.json not in (None, "-"):
                results.write(found, arguments.json)  # what is there if this is interrupted
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

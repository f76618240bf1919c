"""Results as Markdown, and the section of a README that is made of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks import readme
from benchmarks.cases.problems import OURS
from benchmarks.machine import one_line
from benchmarks.readme import table
from benchmarks.reports.plots import PLOTS
from benchmarks.reports.results import OK, Results, Row, ratio, read
from benchmarks.reports.tables import mebibytes, milliseconds

NOTE = " \\*"  # marks a peer that ran in another precision

# Columns of times relative to ours, and the implementations that each may show.
PEERS = {
    "layer by layer": ("torchvision", "layer by layer"),
    "torch.compile": ("torchvision, torch.compile", "layer by layer, torch.compile"),
    "mmcv": ("mmcv",),
    "reference": ("reference",),
    "dense conv": ("dense convolution",),
}


# The cases that a README shows; the file behind the link has all.
SHOWN = ("block", "head", "unified", "deform_conv", "spatial_attention")


def run(arguments: argparse.Namespace) -> int:
    """Prints the tables of files, or writes them into a README; returns the exit status."""
    target: Path | None = arguments.write
    base = Path.cwd() if target is None else target.resolve().parent
    text = section(arguments.files, base)
    if target is None:
        print(text)
    else:
        readme.write_section(target, readme.BENCHMARKS, text)
    return 0


def section(paths: Sequence[Path], base: Path) -> str:
    """The tables of all files, with links relative to the directory ``base``."""
    return "\n\n".join(_report(path, base) for path in paths)


def _report(path: Path, base: Path) -> str:
    results = read(path)
    facts = results.environment
    groups = _shown(results)
    columns = [name for name in PEERS if any(_peer(name, group, OK) for group in groups)]
    rated = bool(results.rates)
    header = ["case", "precision", "direction", OURS, *columns, *["roofline"] * rated, "memory"]
    rows = [_cells(results, group, columns) for group in groups]
    lines = [
        f"{one_line(facts)}, {str(facts['date'])[:10]}, commit {facts['commit'] or 'unknown'}:",
        "",
        f"    {facts['command']}",
        "",
        table(header, rows, text_columns=3),
        "",
        _legend(
            facts["device"] if rated else None,
            noted=any(NOTE in cell for row in rows for cell in row),
        ),
        "",
        _links(path, base),
    ]
    return "\n".join(lines)


def _shown(results: Results) -> list[dict[str, Row]]:
    """The groups with peers; only those of the cases in ``SHOWN`` if there are any."""
    groups = [group for group in results.groups() if OURS in group and len(group) > 1]
    return [group for group in groups if group[OURS].case in SHOWN] or groups


def _peer(column: str, group: dict[str, Row], *statuses: str) -> Row | None:
    """The first row for a column of ``PEERS``, with one of some statuses; with any by default."""
    rows = (group[kind] for kind in PEERS[column] if kind in group)
    return next((row for row in rows if not statuses or row.status in statuses), None)


def _cells(results: Results, group: dict[str, Row], columns: Sequence[str]) -> list[str]:
    own = group[OURS]
    cells = [_case(own), own.precision, own.direction]
    cells.append(milliseconds(own.time.median) if own.time else own.status)
    for column in columns:
        peer = _peer(column, group)
        times = ratio(peer, own)
        if peer is None or times is None:
            cells.append("")
        else:
            cells.append(f"{times:.1f} x" + NOTE * (peer.ran_in != peer.precision))
    if results.rates:
        share = results.of_roofline(own)
        cells.append("" if share is None else f"{share:.0%}")
    cells.append(_memory(group))
    return cells


def _case(row: Row) -> str:
    blocks = f", {row.blocks} blocks" if row.blocks > 1 else ""
    return f"{row.case}, {row.shapes}, batch {row.batch}{blocks}"


def _memory(group: dict[str, Row]) -> str:
    """Our memory, and that of the layers."""
    rows = [group[OURS], *(group[kind] for kind in PEERS["layer by layer"] if kind in group)]
    return " / ".join(mebibytes(row.memory) for row in rows if row.memory is not None)


def _legend(rated: str | None, noted: bool) -> str:
    """What the columns mean; ``rated``: the device, if they have a roofline."""
    text = (
        "Medians; the columns of others say how many times longer they take. Memory is the peak "
        "beyond inputs and parameters, ours / layer by layer."
    )
    if rated:
        products = "multiply-adds on registers" if rated == "cpu" else "large matrix products"
        text += (
            f" Roofline: the time that the rates of a large copy and of {products}, measured in "
            "the same run, allow, over the time taken."
        )
    if noted:
        text += f"{NOTE} in its own best precision, as it has no kernel of this one."
    return text


def _links(path: Path, base: Path) -> str:
    files = [("all numbers", path)]
    files += [(name, path.with_name(f"{path.stem}-{name}.png")) for name in PLOTS]
    links = [
        f"[{name}]({os.path.relpath(file, base).replace(os.sep, '/')})"
        for name, file in files
        if file.is_file()
    ]
    return ", ".join(links)

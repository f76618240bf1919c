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
from benchmarks.reports.results import OK, Row, ratio, read
from benchmarks.reports.tables import mebibytes, milliseconds

NOTE = " \\*"  # another precision

# Columns of times relative to ours, and the implementations that can stand in one.
PEERS = {
    "layer by layer": ("torchvision", "layer by layer"),
    "torch.compile": ("torchvision, torch.compile", "layer by layer, torch.compile"),
    "mmcv": ("mmcv",),
    "reference": ("reference",),
    "dense conv": ("dense convolution",),
}


# What a README shows where it was measured; every case is in the file behind the link.
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
    lines = [
        f"{one_line(facts)}, {str(facts['date'])[:10]}, commit {facts['commit'] or 'unknown'}:",
        "",
        f"    {facts['command']}",
        "",
    ]
    groups = [g for g in results.groups() if OURS in g and len(g) > 1]
    groups = [g for g in groups if g[OURS].case in SHOWN] or groups
    columns = [
        name
        for name, kinds in PEERS.items()
        if any(kind in g and g[kind].status == OK for g in groups for kind in kinds)
    ]
    rated = results.ceilings is not None
    header = ["case", "precision", "direction", OURS, *columns, *["roofline"] * rated, "memory"]
    rows = []
    noted = False
    for group in groups:
        own = group[OURS]
        cells = [_case(own), own.precision, own.direction]
        cells.append(milliseconds(own.time.median) if own.time else own.status)
        for column in columns:
            peer = next((group[kind] for kind in PEERS[column] if kind in group), None)
            times = ratio(peer, own)
            other = peer is not None and peer.ran_in != peer.precision
            noted = noted or (other and times is not None)
            cells.append("" if times is None else f"{times:.1f} x" + NOTE * other)
        share = results.of_roofline(own)
        cells += ["" if share is None else f"{share:.0%}"] * rated
        cells.append(_memory(group))
        rows.append(cells)
    lines.append(table(header, rows, text_columns=3))
    lines += ["", _legend(rated, noted), "", _links(path, base)]
    return "\n".join(lines)


def _case(row: Row) -> str:
    blocks = f", {row.blocks} blocks" if row.blocks > 1 else ""
    return f"{row.case}, {row.shapes}, batch {row.batch}{blocks}"


def _memory(group: dict[str, Row]) -> str:
    """Ours, and that of the layers."""
    rows = [group[OURS], *(group[kind] for kind in PEERS["layer by layer"] if kind in group)]
    return " / ".join(mebibytes(row.memory) for row in rows if row.memory is not None)


def _legend(rated: bool, noted: bool) -> str:
    text = (
        "Medians; the columns of others say how many times longer they take. Memory is the peak "
        "beyond inputs and parameters, ours / layer by layer."
    )
    if rated:
        text += (
            " Roofline: the time that the rates of a large copy and of large matrix products, "
            "measured in the same run, allow, over the time taken."
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

"""Sections of a README that commands write, between ``<!-- NAME: begin -->`` and ``end``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# The sections that there are.
BENCHMARKS, RUNTIMES, STUDY, MODEL = "bench", "runtimes", "study", "model"
FIRST_WEIGHTS, THREADS = "first-weights", "threads"


def section_of(name: str, results: Path) -> str:
    """The section for a file of results, where several files have one each: "runtimes cpu"."""
    return f"{name} {results.stem}"


class SectionError(Exception):
    """A file without the markers of a section."""


def markers(name: str) -> tuple[str, str]:
    """The lines before and after section ``name``."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def replace_section(text: str, name: str, new: str) -> str:
    """``text`` with what stands between the markers of section ``name`` replaced.

    Raises:
        SectionError: the markers are not there, once each and in order.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SectionError(f"expected the lines {begin} and {end} once each, in this order")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{new}\n{end}{tail}"


def write_section(path: Path, name: str, new: str) -> None:
    """Replaces section ``name`` of a file; see :func:`replace_section`."""
    path.write_text(replace_section(path.read_text(), name, new))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; columns after the first ``text_columns`` are numbers, to the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))

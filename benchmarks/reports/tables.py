"""Results for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from benchmarks.cases.problems import BOTH, FORWARD
from benchmarks.measuring.timing import GRAPH
from benchmarks.reports.results import OK, Results, Row, own_row, ratio

COLUMNS = (
    "",
    "implementation",
    "median",
    "+-",
    "graph",
    "x ours",
    "TFLOP/s",
    "GB/s",
    "roofline",
    "memory",
    "kernels",
    "error",
)

SHORT = {FORWARD: "fwd", BOTH: "fwd+bwd"}


def milliseconds(seconds: float) -> str:
    """With three digits: "0.123 ms", "12.3 ms", "1234 ms"."""
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def label(row: Row) -> str:
    """The implementation, with the precision that it ran in if that is another one."""
    return row.implementation + (f" ({row.ran_in})" if row.ran_in != row.precision else "")


def table_of(title: str, results: Results, rows: Sequence[Row]) -> Table:
    """One line for each row; the rows are of one case at one size.

    +- is half the distance of the quartiles, as a share of the median.
    """
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for column in COLUMNS:
        left = column in COLUMNS[:2]
        table.add_column(column, justify="left" if left else "right", no_wrap=not left)
    previous = None
    for row in rows:
        if previous is not None and previous.key != row.key:
            table.add_section()
        first = previous is None or previous.key != row.key
        what = f"{row.precision}, {SHORT[row.direction]}" if first else ""
        previous = row
        time = row.time
        if row.status != OK or time is None:
            remark = f"[bold red]{row.status}[/]: {escape(row.remark)}"
            table.add_row(what, f"{escape(label(row))}\n{remark}")
            continue
        times_ours = ratio(row, own_row(results.group(row)))
        graph = row.times.get(GRAPH)
        table.add_row(
            what,
            escape(label(row)) + (f"\n{escape(row.remark)}" if row.remark else ""),
            milliseconds(time.median),
            f"{(time.upper_quartile - time.lower_quartile) / 2 / time.median:.0%}",
            milliseconds(graph.median) if graph else "",
            _optional(times_ours, ".2f"),
            _optional(row.tflop_per_s, ".3g"),
            _optional(row.gb_per_s, ".3g"),
            _optional(results.of_roofline(row), ".0%"),
            mebibytes(row.memory) if row.memory is not None else "",
            "" if row.launches is None else str(row.launches),
            _optional(row.error, ".0e"),
        )
    return table


def ceilings_line(results: Results) -> str:
    """The measured rates in words."""
    if results.ceilings is None:
        return "rates: not measured"
    said = [f"copy {results.ceilings['copy_gb_per_s']:.3g} GB/s"]
    for name, title in (("product_tflop_per_s", "torch.mm"), ("fma_tflop_per_s", "multiply-adds")):
        if rates := results.ceilings.get(name):
            shown = ", ".join(f"{precision} {rate:.3g}" for precision, rate in rates.items())
            said.append(f"{title} {shown} TFLOP/s")
    return f"rates: {'; '.join(said)}"

"""What is made of results: files, comparison, targets, the table in the docs, plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.__main__ import main
from benchmarks.cases.heads import RECOMPUTE
from benchmarks.cases.problems import BOTH, FORWARD, OURS
from benchmarks.measuring.timing import COLD, WARM, Timing
from benchmarks.reports import compare, plots, report, results, targets
from benchmarks.reports.results import Results, ResultsError, Row
from tests.helpers.benchmark_results import CEILINGS, environment, fast_rows, row
from tests.helpers.paths import ROOT

BEGIN, END = readme.markers(readme.BENCHMARKS)

COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


# --- files --------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    written = Results(
        environment(),
        CEILINGS,
        [
            row(memory=5, launches=30, error=1e-3, checked=["small", "real"]),
            row("torchvision", 0.1, ran_in="float16"),
            row("mmcv", status="failed", remark="no such thing", times={}),
        ],
    )
    target = tmp_path / "results.json"
    results.write(written, str(target))
    assert json.loads(target.read_text())["schema"] == 1
    assert results.read(target) == written
    assert len(target.read_text().splitlines()) < 30  # a row a line


def _without(name: str) -> Callable[[Any], None]:
    return lambda data: data["rows"][0].pop(name)


def _with(name: str, value: Any) -> Callable[[Any], None]:
    return lambda data: data["rows"][0].update({name: value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data.update(schema=2), "expected an object with schema 1, got 2"),
        (lambda data: data["environment"].pop("commit"), r"environment lacks \['commit'\]"),
        (lambda data: data.update(ceilings={}), "expected ceilings"),
        (lambda data: data.update(rows={}), "expected rows to be a list"),
        (lambda data: data["rows"].append(3), "row 1: expected an object"),
        (_without("batch"), r"row 0: unknown or missing fields \['batch'\]"),
        (_with("speed", 3), r"row 0: unknown or missing fields \['speed'\]"),
        (_with("direction", "sideways"), "row 0: expected direction of"),
        (_with("status", "wrong"), "row 0: expected times of an ok row alone"),
        (_with("times", {}), "row 0: expected times of an ok row alone"),
        (_with("times", {"hot": {}}), "row 0: expected times"),
        (_with("times", {"cold": {"median": 1}}), "row 0: .*missing"),
        (
            _with("times", {"cold": vars(Timing(2, 3, 4, 5))}),
            "row 0: quartiles out of order",
        ),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(
    spoil: Callable[[Any], None], message: str
) -> None:
    data = json.loads(json.dumps(Results(environment(), CEILINGS, [row()]).as_data()))
    results.from_data(data)
    spoil(data)
    with pytest.raises(ResultsError, match=message):
        results.from_data(data)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"missing\.json: expected JSON"):
        results.read(tmp_path / "missing.json")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_keep_to_the_schema(path: Path) -> None:
    found = results.read(path)
    assert found.rows
    assert {row.status for row in found.rows} <= {results.OK, results.SKIPPED}


def test_derived_numbers() -> None:
    slow, bound = row(), row(flops=0)
    found = Results(environment(), CEILINGS, [slow, bound, row("torchvision", 0.05)])
    assert slow.tflop_per_s == pytest.approx(200)
    assert slow.gb_per_s == pytest.approx(100)
    # 2e12 / 800e12 = 2.5 ms of products, 1e9 / 4000e9 = 0.25 ms of bytes
    assert found.roofline_seconds(slow) == pytest.approx(0.0025)
    assert found.of_roofline(slow) == pytest.approx(0.25)
    assert found.of_roofline(bound) == pytest.approx(0.025)
    assert found.of_roofline(row(ran_in="float32")) == pytest.approx(4)
    assert found.of_roofline(row(ran_in="float16")) is None
    assert results.ratio(found.rows[2], slow) == pytest.approx(5)
    assert results.ratio(None, slow) is None
    several = row(times={WARM: Timing(1, 1, 1, 2), COLD: Timing(2, 2, 2, 2)})
    assert several.time == Timing(2, 2, 2, 2)


def test_on_a_cpu_the_roofline_is_that_of_multiply_adds() -> None:
    slow = row(ran_in="float32", precision="float32")
    without = Results(environment("cpu"), CEILINGS, [slow])
    assert without.of_roofline(slow) is None  # torch.mm may be far below what is possible
    measured = {**CEILINGS, "fma_tflop_per_s": {"float32": 400.0}}
    assert Results(environment("cpu"), measured, [slow]).of_roofline(slow) == pytest.approx(0.5)
    data = Results(environment("cpu"), measured, [slow]).as_data()
    assert results.from_data(json.loads(json.dumps(data))).rates == {"float32": 400.0}


# --- compare ------------------------------------------------------------------------------------


def regressions(before: list[Row], after: list[Row], threshold: float = 0.05) -> list[str]:
    a, b = (Results(environment(), None, rows) for rows in (before, after))
    return [c.regression for c in compare.compare(a, b, threshold) if c.regression]


def test_compare_flags_ours_alone() -> None:
    assert regressions([row()], [row(seconds=0.0104)]) == []
    assert regressions([row()], [row(seconds=0.011)]) == ["10% slower"]
    assert regressions([row()], [row(seconds=0.011)], threshold=0.2) == []
    assert regressions([row("torchvision")], [row("torchvision", 0.02)]) == []
    assert regressions([row()], [row(seconds=0.005)]) == []
    assert regressions([row(RECOMPUTE)], [row(RECOMPUTE, 0.02)]) == ["100% slower"]


def test_compare_wants_more_than_the_spread() -> None:
    noisy = row(times={COLD: Timing(0.011, 0.009, 0.013, 10)})
    assert regressions([row()], [noisy]) == []


def test_compare_flags_memory_and_wrong_results() -> None:
    mib = 2**20
    assert regressions([row(memory=100 * mib)], [row(memory=110 * mib)]) == ["10 MiB more memory"]
    assert regressions([row(memory=mib // 2)], [row(memory=mib)]) == []
    wrong = row(status="wrong", remark="far off", times={})
    assert regressions([row()], [wrong]) == ["wrong: far off"]
    assert regressions([row()], []) == []
    assert regressions([wrong], [row(seconds=9)]) == []


def _write(path: Path, rows: list[Row], **facts: Any) -> str:
    results.write(Results({**environment(), **facts}, CEILINGS, rows), str(path))
    return str(path)


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _write(tmp_path / "a.json", [row(), row("torchvision", 0.1), row(batch=1)])
    slower = _write(tmp_path / "b.json", [row(seconds=0.012), row("torchvision", 0.11)])
    other = _write(tmp_path / "c.json", [row()], processor="another")
    assert main(["compare", before, before]) == 0
    assert "0 regressions" in capsys.readouterr().out
    assert main(["compare", before, slower]) == 1
    out = capsys.readouterr().out
    assert "REGRESSION: 20% slower" in out
    assert "not measured again" in out
    assert "peers, which did not change: x 1.100" in out
    assert main(["compare", before, slower, "--threshold", "0.3"]) == 0
    capsys.readouterr()
    assert main(["compare", before, other]) == 2
    assert "expected two runs of one machine, got processor" in capsys.readouterr().err
    assert main(["compare", before, other, "--force"]) == 0


# --- targets ------------------------------------------------------------------------------------


def verdicts(rows: list[Row], device: str = "cuda") -> list[str]:
    found = Results(environment(device), CEILINGS, rows)
    return [v.verdict for v in targets.judge([found])]


def test_all_targets_can_be_reached() -> None:
    assert verdicts(fast_rows()) == [targets.REACHED] * len(targets.TARGETS)


def test_nothing_measured_reaches_nothing() -> None:
    nothing = [targets.NOT_MEASURED] * len(targets.TARGETS)
    assert verdicts([]) == nothing
    assert verdicts(fast_rows(), "cpu") == nothing
    others = [replace(r, shapes="yolo") for r in fast_rows()]
    assert verdicts(others) == nothing
    assert verdicts([replace(r, status="wrong", times={}) for r in fast_rows()]) == nothing


def test_a_slow_run_misses_them() -> None:
    slower = [
        replace(
            r,
            times={m: Timing(3 * t.median, 1, 9, 2) for m, t in r.times.items()},
            launches=r.launches and 37,
            memory=r.memory and 3 * r.memory,
        )
        if r.implementation.startswith(OURS)
        else r
        for r in fast_rows()
    ]
    assert verdicts(slower) == [targets.MISSED] * len(targets.TARGETS)


def test_a_first_step_and_the_worst_batch_count() -> None:
    def of(title: str, rows: list[Row], **wanted: Any) -> targets.Verdict:
        judged = targets.judge([Results(environment(), CEILINGS, rows)])
        return next(
            v
            for v in judged
            if v.target.title == title
            and all(getattr(v.target, name) == value for name, value in wanted.items())
        )

    rows = [
        replace(r, times={COLD: Timing(0.009, 1, 1, 2)})
        if r.implementation == OURS and r.batch == 8
        else r
        for r in fast_rows()
    ]
    step = of("of the roofline", rows)
    assert (step.verdict, step.value) == (targets.FIRST_STEP, pytest.approx(0.0025 / 0.009))
    full = [replace(r, batch=8) for r in fast_rows() if r.precision == "float32"]
    own = [r for r in full if r.implementation == OURS]
    slow = [replace(r, times={COLD: Timing(0.02, 1, 1, 2)}) for r in own]
    rows = [*fast_rows(), *slow, *(r for r in full if r.implementation != OURS)]
    worst = of("times faster than (a)", rows, precision="float32", stage="forward")
    assert (worst.verdict, worst.value) == (targets.MISSED, pytest.approx(2))


def test_targets_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = fast_rows()
    files = [
        _write(tmp_path / f"{batch}.json", [r for r in rows if r.batch == batch])
        for batch in (1, 8)
    ]
    assert main(["targets", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(targets.TARGETS) + 2
    assert all(line.endswith("reached") for line in lines[1:-1])
    assert "6 blocks, batch 8, bfloat16, forward+backward: times faster than (a)" in lines[8]
    assert ">= 8.0      8.0  reached" in lines[8]


# --- Markdown -----------------------------------------------------------------------------------


def test_report(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    path.parent.mkdir()
    rows = [
        row(memory=30 * 2**20),
        row("torchvision", 0.1, ran_in="float16", memory=300 * 2**20),
        row("torchvision, torch.compile", 0.07, ran_in="float16"),
        row("mmcv", status="failed", times={}),
        row(batch=2),  # nobody else: not in the table
    ]
    _write(path, rows)
    path.with_name("gpu-roofline.png").touch()
    text = report.section([path], tmp_path)
    assert "a processor, torch 2.11.0, 2026-01-02, commit 0123456789ab:" in text
    assert "    python -m benchmarks --some options" in text
    cells = ["head, glip, batch 8, 6 blocks", "bfloat16", "forward", "10 ms"]
    cells += ["10.0 x \\*", "7.0 x \\*", "25%", "30 MiB / 300 MiB"]
    assert f"| {' | '.join(cells)} |" in text
    assert "batch 2" not in text
    assert "mmcv" not in text
    assert "best precision" in text
    assert text.endswith("[all numbers](results/gpu.json), [roofline](results/gpu-roofline.png)")


def test_a_report_shows_a_roofline_where_it_was_measured(tmp_path: Path) -> None:
    def text(ceilings: dict[str, Any]) -> str:
        path = tmp_path / "cpu.json"
        rows = [row(), row("torchvision", 0.1)]
        results.write(Results(environment("cpu"), ceilings, rows), str(path))
        return report.section([path], tmp_path)

    assert "oofline" not in text(CEILINGS)
    measured = text({**CEILINGS, "fma_tflop_per_s": {"bfloat16": 400.0}})
    assert "| roofline |" in measured
    assert " 50% |" in measured
    assert "multiply-adds on registers" in measured


def test_report_is_written_between_the_markers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path / "gpu.json", [row(), row("torchvision", 0.1)])
    target = tmp_path / "README.md"
    target.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["report", path, "--write", str(target)]) == 0
    text = target.read_text()
    assert text.startswith(f"before\n{BEGIN}\na processor")
    assert text.endswith(f"(gpu.json)\n{END}\nafter\n")
    assert main(["report", path, "--write", str(target)]) == 0
    assert target.read_text() == text
    target.write_text("no markers")
    assert main(["report", path, "--write", str(target)]) == 2
    assert "expected the lines" in capsys.readouterr().err
    assert target.read_text() == "no markers"


def test_the_docs_show_the_committed_results() -> None:
    path = ROOT / "docs" / "performance.md"
    text = path.read_text()
    assert COMMITTED
    new = report.section(COMMITTED, path.parent)
    assert readme.replace_section(text, readme.BENCHMARKS, new) == text, (
        "run python -m benchmarks report benchmarks/results/*.json --write docs/performance.md"
    )


# --- plots --------------------------------------------------------------------------------------


def test_every_plot_is_drawn_and_small(tmp_path: Path) -> None:
    rows = [replace(r, memory=r.memory or 2**20) for r in fast_rows()]
    for shapes, batch in (("glip", 1), ("glip", 2), ("yolo", 1), ("swin", 1)):
        for direction in (FORWARD, BOTH):
            rows.append(row(case="block", shapes=shapes, batch=batch, direction=direction))
    found = Results(environment(), CEILINGS, rows)
    written = plots.draw_all(found, tmp_path / "gpu")
    assert [path.name for path in written] == [f"gpu-{name}.png" for name in plots.PLOTS]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert 5_000 < path.stat().st_size < 150_000


def test_no_plot_without_data(tmp_path: Path) -> None:
    assert plots.draw_all(Results(environment(), None, [row()]), tmp_path / "gpu") == []
    assert list(tmp_path.iterdir()) == []


def test_plots_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path / "gpu.json", fast_rows())
    assert main(["plot", path]) == 0
    assert str(tmp_path / "gpu-ratios.png") in capsys.readouterr().out
    assert (tmp_path / "gpu-ratios.png").is_file()


def test_committed_plots_are_small() -> None:
    files = [p for p in (ROOT / "benchmarks" / "results").rglob("*") if p.is_file()]
    assert len(files) > 4
    for path in files:
        assert path.suffix in (".json", ".png", ".svg")
        assert path.suffix == ".json" or path.stat().st_size < 150_000

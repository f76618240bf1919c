"""``make gpu-check``: its steps, its time limits and its verdicts, all without a GPU."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import arguments as options
from benchmarks import gpu_check
from benchmarks.gpu_check import Step
from benchmarks.measuring import selection
from benchmarks.measuring.measure import selection_of
from benchmarks.reports import results, targets
from tests.helpers.benchmark_results import CEILINGS, environment, fast_rows


def python(name: str, code: str, **options: object) -> Step:
    defaults: dict[str, object] = {"limit_s": 30.0, "log": "test.log"}
    return Step(name, [sys.executable, "-c", code], **(defaults | options))  # type: ignore[arg-type]


def verdicts(steps: list[Step], output: Path, budget_s: float = 60.0) -> dict[str, str]:
    outcomes = gpu_check.run_steps(steps, output, budget_s)
    return {outcome.step.name: outcome.verdict for outcome in outcomes}


def test_the_steps_build_test_sanitize_and_measure() -> None:
    steps = gpu_check.steps_for(["90a"], "/tools/compute-sanitizer", Path("/results"))
    assert [step.name for step in steps] == [
        "build",
        "info",
        "check",
        "benchmark head-batch8",
        "benchmark head-batch1",
        "tests",
        "memcheck",
        "racecheck",
        "initcheck",
        "benchmark operators",
    ]
    assert steps[0].essential
    assert steps[0].environment == {
        "DYHEAD_CUDA_ARCHS": "90a",
        "DYHEAD_REQUIRE": "cpu,cuda",
        "DYHEAD_LINEINFO": "on",
    }
    for step in steps:
        assert (step.command[0] == "/tools/compute-sanitizer") == (
            step.name in gpu_check.SANITIZERS
        )
        assert not {"pip", "install", "uv", "apt-get"} & set(step.command)
    assert gpu_check.BUDGET_S < 9 * 60
    logs = {step.log for step in steps}
    files = {*gpu_check.HEAD_BENCHMARKS, *gpu_check.OPERATOR_BENCHMARKS, "summary.txt"}
    assert len(logs | files) <= 8
    missing = gpu_check.steps_for(["90a"], None, Path("/results"))
    assert [bool(step.unavailable) for step in missing] == [
        step.name in gpu_check.SANITIZERS for step in missing
    ]


def benchmark_arguments(name: str) -> argparse.Namespace:
    steps = gpu_check.steps_for(["90a"], None, Path("/tmp"))
    command = next(s.command for s in steps if s.name == f"benchmark {Path(name).stem}")
    assert command[1:4] == ["-m", "benchmarks", "--device"]
    parser = argparse.ArgumentParser()
    options.measure(parser)
    return parser.parse_args(command[3:])


def test_the_benchmarks_measure_what_the_targets_are_about() -> None:
    measured = set()
    for name in gpu_check.HEAD_BENCHMARKS:
        arguments = benchmark_arguments(name)
        assert arguments.json == f"/tmp/{name}"
        for entry in selection.entries(selection_of(arguments), "cuda"):
            s = entry.setting
            for precision in entry.precisions:
                for direction in entry.directions:
                    key = (s.case, s.shapes.name, s.blocks, precision, direction)
                    measured |= {(*key, s.batch), (*key, 0)}
        assert "torchvision" in arguments.peers
    for target in targets.TARGETS:
        key = (target.case, "glip", target.blocks, target.precision, target.direction)
        assert (*key, target.batch) in measured, target.title
    assert "compile" in benchmark_arguments("head-batch8.json").peers
    assert benchmark_arguments("head-batch1.json").graph


def test_the_operators_are_measured() -> None:
    arguments = benchmark_arguments("operators.json")
    assert {"branches", "fuse_branches", "dynamic_relu"} <= set(arguments.only)


def test_the_targets_are_told_from_the_results(tmp_path: Path) -> None:
    assert gpu_check.format_targets(tmp_path) == "no benchmark results: no target was measured"
    rows = fast_rows()
    for name, batch in (("head-batch8.json", 8), ("head-batch1.json", 1)):
        chosen = [row for row in rows if row.batch == batch]
        results.write(results.Results(environment(), CEILINGS, chosen), str(tmp_path / name))
    assert gpu_check.format_targets(tmp_path).count("  reached") == len(targets.TARGETS)
    (tmp_path / "head-batch1.json").unlink()
    text = gpu_check.format_targets(tmp_path)
    assert text.count("  reached") + text.count("  not measured") == len(targets.TARGETS)
    assert "ms with a CUDA graph" in next(x for x in text.splitlines() if "not measured" in x)


def test_verdicts(tmp_path: Path) -> None:
    clean = "print('========= ERROR SUMMARY: 0 errors')"
    steps = [
        python("fine", "print('hello')"),
        python("wrong", "raise SystemExit(3)"),
        python("memcheck", clean),
        python("racecheck", "print('= RACECHECK SUMMARY: 0 hazards displayed (0 errors)')"),
        python("initcheck", "print('nothing was checked')"),
        python("absent", "raise SystemExit(1)", unavailable="no such tool"),
        Step("no program", ["/nonexistent"], 30.0, "test.log"),
    ]
    assert verdicts(steps, tmp_path) == {
        "fine": "passed",
        "wrong": "FAILED",
        "memcheck": "passed",
        "racecheck": "passed",
        "initcheck": "FAILED",
        "absent": "not available",
        "no program": "FAILED",
    }
    assert "hello" in (tmp_path / "test.log").read_text()


def test_a_sanitizer_that_refuses_the_device_is_not_available(tmp_path: Path) -> None:
    refuses = python("memcheck", "print('Device not supported'); raise SystemExit(1)")
    assert verdicts([refuses], tmp_path) == {"memcheck": "not available"}


def test_nothing_runs_after_a_failed_build(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    steps = [
        python("build", "raise SystemExit(1)", essential=True),
        python("tests", f"open({str(marker)!r}, 'w')"),
    ]
    outcomes = gpu_check.run_steps(steps, tmp_path)
    assert [outcome.verdict for outcome in outcomes] == ["FAILED", "FAILED"]
    assert outcomes[1].remark == "not run: build failed"
    assert not marker.exists()
    assert "0 passed, 2 failed, 0 unavailable" in gpu_check.format_table(outcomes)


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    marker = tmp_path / "child ran on"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    steps = [python("hangs", code, limit_s=1.5), python("next", "pass")]
    assert verdicts(steps, tmp_path) == {"hangs": "FAILED", "next": "passed"}
    time.sleep(3)
    assert not marker.exists()


def test_what_the_time_does_not_suffice_for_has_failed(tmp_path: Path) -> None:
    steps = [python("slow", "import time; time.sleep(60)"), python("late", "pass")]
    outcomes = gpu_check.run_steps(steps, tmp_path, budget_s=2.0)
    assert [outcome.verdict for outcome in outcomes] == ["FAILED", "FAILED"]
    assert outcomes[1].remark == "not run: out of time"


def test_the_dry_run_prints_every_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run"],
        cwd=Path(gpu_check.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    for part in (
        "build_ext --inplace",
        "-m gpu",
        *gpu_check.SANITIZERS,
        "benchmarks --device cuda",
    ):
        assert part in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "expected a CUDA GPU" in capsys.readouterr().err

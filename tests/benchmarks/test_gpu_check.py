"""``make gpu-check``: its steps, its time limits and its verdicts, all without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import arguments as options
from benchmarks import gpu_check, gpu_steps
from benchmarks.gpu_steps import Step
from benchmarks.measuring import selection
from benchmarks.measuring.measure import selection_of
from benchmarks.reports import results, targets
from tests.helpers.benchmark_results import CEILINGS, environment, fast_rows, row
from tests.helpers.paths import ROOT


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
        "wgmma",
        "benchmark head-wgmma",
        "benchmark operators",
        "benchmark head-compiled",
    ]
    assert steps[0].essential
    assert steps[0].environment == {
        "DYHEAD_CUDA_ARCHS": "90a",
        "DYHEAD_REQUIRE": "cpu,cuda",
        "DYHEAD_LINEINFO": "on",
        "MAX_JOBS": str(len(os.sched_getaffinity(0))),
    }
    for step in steps:
        assert (step.command[0] == "/tools/compute-sanitizer") == (
            step.name in gpu_check.SANITIZERS
        )
        assert not {"pip", "install", "uv", "apt-get"} & set(step.command)
    logs = {step.log for step in steps}
    files = {*gpu_check.HEAD_BENCHMARKS, *gpu_check.OPERATOR_BENCHMARKS, "summary.txt"}
    assert len(logs | files) <= 8
    missing = gpu_check.steps_for(["90a"], None, Path("/results"))
    assert [bool(step.unavailable) for step in missing] == [
        step.name in gpu_check.SANITIZERS for step in missing
    ]


def test_the_limits_add_up_to_the_budget() -> None:
    steps = gpu_check.steps_for(["90a"], None, Path("/results"))
    assert sum(step.limit_s for step in steps) <= gpu_steps.BUDGET_S < 9 * 60
    assert {step.name: step.limit_s for step in steps} == gpu_steps.LIMITS_S
    for step in steps:
        *_, option, seconds = step.command_within(step.limit_s)
        assert (option == "--seconds") == step.name.startswith("benchmark")
        if option == "--seconds":
            assert 10 <= int(seconds) < step.limit_s
            assert int(step.command_within(step.limit_s + 50)[-1]) == int(seconds) + 50


def test_every_run_of_pytest_says_what_it_begins() -> None:
    steps = gpu_check.steps_for(["90a"], "/tools/compute-sanitizer", Path("/results"))
    runs = {step.name: step.command for step in steps if "pytest" in step.command}
    assert set(runs) == {"tests", "wgmma", *gpu_check.SANITIZERS}
    for name, command in runs.items():
        assert "-v" in command
        assert "-q" not in command
        marks = {"tests": "gpu and not wgmma", "wgmma": "", "initcheck": "initcheck"}
        mark = marks.get(name, "sanitize")
        assert " ".join(command).count(" -m ") == 1 + bool(mark)  # and that of python
        assert f" -m {mark}" in " ".join(command)
        # Memory that an unwatched kernel wrote is uninitialised to initcheck.
        assert ("--kernel-name" in command) == (name in ("memcheck", "racecheck"))


def test_wgmma_runs_by_itself() -> None:
    def of(archs: list[str]) -> dict[str, Step]:
        steps = gpu_check.steps_for(archs, None, Path("/results"))
        return {step.name: step for step in steps if "wgmma" in step.name}

    tests, benchmark = of(["80", "90a"]).values()
    assert not tests.unavailable
    assert "DYHEAD_CUDA_MMA" not in tests.environment  # the tests compare both
    assert benchmark.environment == {"DYHEAD_CUDA_MMA": "wgmma"}
    assert all("9.0" in step.unavailable for step in of(["80"]).values())


def test_the_sanitizer_is_found_beside_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    program = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    assert gpu_steps.find_sanitizer() == str(program)


def test_what_is_left_out_of_the_tests_is_there() -> None:
    file, name = gpu_steps.RUN_BY_CHECK.split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


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
        assert arguments.peers == ["compile"] or "torchvision" in arguments.peers
    for target in targets.TARGETS:
        key = (target.case, "glip", target.blocks, target.precision, target.direction)
        assert (*key, target.batch) in measured, target.title
    compiled = benchmark_arguments("head-compiled.json")
    assert (compiled.peers, compiled.batch) == (["compile"], [8])
    assert benchmark_arguments("head-batch1.json").graph


def test_the_operators_are_measured() -> None:
    arguments = benchmark_arguments("operators.json")
    assert {"branches", "fuse_branches", "dynamic_relu"} <= set(arguments.only)


def test_the_targets_are_told_from_the_results(tmp_path: Path) -> None:
    assert gpu_check.format_targets(tmp_path) == "no benchmark results: no target was measured"
    rows = fast_rows()
    for name, batch in (
        ("head-batch8.json", 8),
        ("head-batch1.json", 1),
        ("head-compiled.json", 8),
    ):
        left_out = targets.LAYERS if "compiled" in name else targets.COMPILED
        chosen = [r for r in rows if r.batch == batch and r.implementation != left_out]
        results.write(results.Results(environment(), CEILINGS, chosen), str(tmp_path / name))
    assert gpu_check.format_targets(tmp_path).count("  reached") == len(targets.TARGETS)
    (tmp_path / "head-batch1.json").unlink()
    text = gpu_check.format_targets(tmp_path)
    assert text.count("  reached") + text.count("  not measured") == len(targets.TARGETS)
    assert "ms with a CUDA graph" in next(x for x in text.splitlines() if "not measured" in x)
    (tmp_path / "head-compiled.json").write_text('{"schema": 1, "rows": [')
    text = gpu_check.format_targets(tmp_path)
    assert text.startswith(f"{tmp_path / 'head-compiled.json'}: expected JSON")
    assert "times faster than (a)" in text


SKIPPED = """
SKIPPED [3] tests/gpu/device.py:27: needs two GPUs
SKIPPED [1] tests/gpu/device.py:27: needs two GPUs
============ 3 passed, 4 skipped in 1.23s =============
"""


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    steps = [
        python("tests", f"print({SKIPPED!r})"),
        python("memcheck", "", unavailable="no such tool"),
        python("poor", "pass", needs=("torch", "no_such_module")),
        python("slow", "import time; time.sleep(60)", limit_s=1.5),
    ]
    outcomes = gpu_check.run_steps(steps, tmp_path, budget_s=4)
    rows = [*fast_rows(), row("dense", status="skipped", remark="out of time", times={})]
    results.write(results.Results(environment(), CEILINGS, rows), str(tmp_path / "operators.json"))
    lines = gpu_check.format_left_out(outcomes, tmp_path).splitlines()
    assert [line.split(":")[0].strip() for line in lines[:6]] == [
        *("left out", "memcheck", "poor", "slow", "tests", "operators.json")
    ]
    assert lines[2].endswith("has no no_such_module")
    assert lines[4].endswith("skipped: needs two GPUs")
    assert lines[5].endswith("1 rows without a number (dense: out of time)")


def test_verdicts(tmp_path: Path) -> None:
    tested = "print('=== 3 passed in 1.23s ==='); "
    clean = tested + "print('========= ERROR SUMMARY: 0 errors')"
    hazards = "print('= RACECHECK SUMMARY: 0 hazards displayed (0 errors)')"
    steps = [
        python("fine", "print('hello')"),
        python("wrong", "raise SystemExit(3)"),
        python("memcheck", clean),
        python("racecheck", tested + hazards),
        python("initcheck", tested + "print('nothing was checked')"),
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


@pytest.mark.parametrize("said", ["=== 9 skipped in 1.23s ===", "=== no tests ran in 1.23s ==="])
@pytest.mark.parametrize("name", ["tests", "memcheck"])
def test_a_run_in_which_nothing_passed_has_failed(name: str, said: str, tmp_path: Path) -> None:
    code = f"print('{said}'); print('= ERROR SUMMARY: 0 errors')"
    (outcome,) = gpu_check.run_steps([python(name, code)], tmp_path)
    assert outcome.verdict == "FAILED"
    assert outcome.remark.startswith("no test passed")


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


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """There, shells let a command ignore SIGINT, and all its children with it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


TESTS = """
import os, signal, time

signal.signal(signal.SIGINT, signal.default_int_handler)  # if it is ignored, as in the background

def test_fine(): pass
def test_wrong(): assert 1 == 2
def test_slow():
    os.kill(os.getpid(), signal.SIGINT)  # as when the time is up
    time.sleep(60)
def test_late(): pass
"""


def test_stopped_tests_tell_what_failed_and_what_ran(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(TESTS)
    (tmp_path / "pytest.ini").touch()
    command = gpu_steps._pytest("tests")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    step = Step("tests", command, 60.0, "tests.log")
    outcome = gpu_check.judged(step, None, 60.0, done.stdout)
    assert outcome.verdict == "FAILED"
    for part in ("50% done", "1 failed, 1 passed in", "running: tests/test_a.py::test_slow; "):
        assert part in outcome.remark
    assert len(outcome.failures) == 1
    assert outcome.failures[0].startswith("FAILED tests/test_a.py::test_wrong")


def test_a_step_gets_sigint_first(tmp_path: Path, in_the_background: None) -> None:
    code = "try: time.sleep(60)\nexcept KeyboardInterrupt: print('the summary')"
    steps = [python("stops", f"import time\n{code}", limit_s=2)]
    (outcome,) = gpu_check.run_steps(steps, tmp_path)
    assert (outcome.verdict, outcome.remark) == ("FAILED", "stopped: the summary; see test.log")
    assert "killed" not in (tmp_path / "test.log").read_text()


def test_a_step_that_ignores_sigint_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.5)
    marker = tmp_path / "child ran on"
    ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{ignore}; time.sleep(3); open({str(marker)!r}, 'w')"
    code = f"{ignore}; import subprocess, sys\nprint('tests/a.py::test_b[c d] ')\n"
    code += f"subprocess.run([sys.executable, '-c', {child!r}])"
    steps = [python("hangs", code, limit_s=2), python("next", "pass")]
    outcomes = gpu_check.run_steps(steps, tmp_path)
    assert [outcome.verdict for outcome in outcomes] == ["FAILED", "passed"]
    assert outcomes[0].remark == "stopped: running: tests/a.py::test_b[c d]; see test.log"
    time.sleep(2)
    assert not marker.exists()


def test_children_that_outlive_a_step_are_killed(tmp_path: Path) -> None:
    marker = tmp_path / "child ran on"
    child = f"import time; time.sleep(2); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    assert verdicts([python("leaves", code)], tmp_path) == {"leaves": "passed"}
    time.sleep(3)
    assert not marker.exists()


def test_a_step_may_use_what_earlier_ones_left(tmp_path: Path) -> None:
    steps = [python("quick", "pass", limit_s=20), python("slow", "import time; time.sleep(2)")]
    steps[1] = dataclasses.replace(steps[1], limit_s=0.0)
    assert verdicts(steps, tmp_path) == {"quick": "passed", "slow": "passed"}


XDIST = """
tests/a.py::test_a[x, y]
tests/a.py::test_big@memory
[gw1] [ 16%] PASSED tests/a.py::test_a[x, y]
tests/b.py::test_c
[gw0] [ 33%] FAILED tests/b.py::test_c
tests/b.py::test_d[torch.float32]
"""
SANITIZED = """
tests/a.py::test_a PASSED                      [ 50%]
tests/a.py::test_b[a block] ========= Invalid __global__ read of size 4 bytes
=========     at void dyhead::pack<float>(Pack)+0x90 in pack.cu:12
"""


def test_the_running_tests_are_those_that_began_and_did_not_end() -> None:
    assert gpu_check.running_tests("") == []
    assert gpu_check.running_tests(XDIST) == [
        "tests/a.py::test_big@memory",
        "tests/b.py::test_d[torch.float32]",
    ]
    assert gpu_check.running_tests(SANITIZED) == ["tests/a.py::test_b[a block]"]


def test_a_sanitizer_names_the_kernel(tmp_path: Path) -> None:
    (outcome,) = gpu_check.run_steps(
        [python("memcheck", f"print({SANITIZED!r}); raise SystemExit(3)")], tmp_path
    )
    assert outcome.verdict == "FAILED"
    assert "first at void dyhead::pack<float>(Pack)+0x90 in pack.cu:12" in outcome.remark


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
        "-m 'gpu and not wgmma'",
        *gpu_check.SANITIZERS,
        "benchmarks --device cuda",
    ):
        assert part in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "expected a CUDA GPU" in capsys.readouterr().err


def test_without_torch_it_says_so_in_one_line() -> None:
    code = "import sys; sys.modules['torch'] = None; from benchmarks.gpu_check import main"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(main([]))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpu-check: expected torch and numpy in {sys.executable}")


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-m pip --version") exit 0 ;;
  "-m pip install"*) exit $(cat installs) ;;
  "-m venv"*) mkdir -p env/bin && cp "$0" env/bin/python ;;
  *) echo "$0 $*" ;;
esac
"""


@pytest.mark.parametrize(
    ("environment", "installs", "used"),
    [("env", 0, "env/bin/python"), ("env", 1, "./fake"), ("none", 1, "./fake")],
    ids=["installed", "no network", "as it is"],
)
def test_the_python_that_make_takes(
    environment: str, installs: int, used: str, tmp_path: Path
) -> None:
    (tmp_path / "installs").write_text(str(installs))
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "fake").write_text(FAKE_PYTHON)
    (tmp_path / "fake").chmod(0o755)
    variables = ["PYTHON=./fake", f"VENV={environment}"]
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "gpu-check", *variables],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"{used} -m benchmarks.gpu_check"
    told = "nothing could be installed into env" in done.stderr
    assert told == (environment == "env" and installs == 1)

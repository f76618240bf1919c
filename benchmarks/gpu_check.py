"""``make gpu-check``: builds for the GPU that is here, measures, tests, and runs the sanitizers.

It uses the Python that runs it. Logs and results go below ``$OUT``, or ``build/gpu-check`` if that
is not set; the last things printed are which of the project's targets were reached, and what was
left out. Exit status: 0 if everything passed (a missed target is no failure), 1 if not, 2 without a
GPU or without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING

from benchmarks.gpu_steps import (
    BUDGET_S,
    HEAD_BENCHMARKS,
    OPERATOR_BENCHMARKS,
    SANITIZERS,
    Step,
    find_sanitizer,
    steps_for,
)

if TYPE_CHECKING:
    from benchmarks.reports.results import Results

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests", *SANITIZERS)  # steps that run pytest
GRACE_S = 5.0  # from SIGINT, after which pytest tells what failed, to SIGKILL
SHOWN_FAILURES = 10
# A line of pytest -v: a test that begins, one that ended, or both, as one process or several print.
_ENDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_TEST = re.compile(
    rf"^(?:\[gw\d+\] .*?(?P<before>{_ENDS}) )?"
    rf"(?P<test>tests/\S+?\.py::\w+(?:\[.*?\])?(?:@\w+)?)(?: (?P<after>{_ENDS})\b|\s|$)",
    re.MULTILINE,
)
_PERCENT = re.compile(r"\[ *(\d+)%\]")
_COUNTS = re.compile(r"^=* ?(\d+ \w+.* in [\d.]+s.*?) ?=*$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: Step
    verdict: str  # "passed", "FAILED" or "not available"
    seconds: float = 0.0
    remark: str = ""
    failures: Sequence[str] = ()  # pytest's line for each test that failed
    skipped: Sequence[str] = ()  # why it skipped tests


def running_tests(said: str) -> list[str]:
    """The tests that had begun, and not ended, where the output of pytest -v ends."""
    running: dict[str, None] = {}
    for match in _TEST.finditer(said):
        if match["before"] or match["after"]:
            running.pop(match["test"], None)
        else:
            running[match["test"]] = None
    return list(running)


def run_command(step: Step, log: IO[bytes], limit_s: float) -> int | None:
    """The exit status; None if the command, with all its children, had to be stopped."""
    try:
        process = subprocess.Popen(
            step.command_within(limit_s),
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # What runs in the background ignores SIGINT, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    except OSError as error:
        log.write(f"{error}\n".encode())
        return 127
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            log.write(b"\nkilled: it did not end on SIGINT\n")
        return None
    finally:
        # Children, too, which may outlive the command.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_step(step: Step, output: Path, limit_s: float) -> Outcome:
    """Runs one step for at most ``limit_s`` seconds, and a few more if it does not end then."""
    if step.unavailable:
        return Outcome(step, "not available", remark=step.unavailable)
    if step.missing:
        missing = ", ".join(step.missing)
        return Outcome(step, "FAILED", remark=f"not run: {sys.executable} has no {missing}")
    start = time.monotonic()
    with (output / step.log).open("ab") as log:
        log.write(f"$ {shlex.join(step.command_within(limit_s))}\n".encode())
        log.flush()
        offset = log.tell()
        status = run_command(step, log, limit_s)
    said = (output / step.log).read_bytes()[offset:].decode(errors="replace")
    return judged(step, status, time.monotonic() - start, said)


def judged(step: Step, status: int | None, seconds: float, said: str) -> Outcome:
    """The outcome of a step by its exit status (None: it was stopped) and what it printed."""
    lines = [line.strip("= \t") for line in said.splitlines() if line.strip("= \t")]
    last = lines[-1] if lines else ""
    failures = re.findall(r"^(?:FAILED|ERROR) tests/.*", said, re.MULTILINE)
    see = f"see {step.log}"
    if status is None:
        where = stopped_at(said) or last
        return Outcome(step, "FAILED", seconds, f"stopped: {where}; {see}", failures)
    if status != 0 and step.name in SANITIZERS and "Device not supported" in said:
        return Outcome(step, "not available", seconds, "compute-sanitizer refuses this device")
    if status != 0:
        place = re.search(r"^=+ +at (.+)", said, re.MULTILINE)
        at = f", first at {place[1]}" if place and step.name in SANITIZERS else ""
        remark = f"exit status {status}: {last}{at}; {see}"
        return Outcome(step, "FAILED", seconds, remark, failures)
    if step.name in SANITIZERS and not re.search(r"SUMMARY: 0 (errors|hazards)", said):
        return Outcome(step, "FAILED", seconds, f"no error summary; {see}")
    if step.name not in TESTS:
        return Outcome(step, "passed", seconds)
    counts = ["", *_COUNTS.findall(said)][-1]
    if not re.search(r"\d passed", counts):
        return Outcome(step, "FAILED", seconds, f"no test passed: {counts or last}; {see}")
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.+)", said, re.MULTILINE)
    return Outcome(step, "passed", seconds, counts, skipped=list(dict.fromkeys(reasons)))


def stopped_at(said: str) -> str:
    """Where a run of pytest -v was when it was stopped; "" if it had begun no test."""
    found = running_tests(said)
    if not found and not _TEST.search(said):
        return ""
    percents, counts = _PERCENT.findall(said), _COUNTS.findall(said)
    parts = [f"{percents[-1]}% done"] if percents else []
    parts += counts[-1:]
    parts.append(f"running: {', '.join(found)}" if found else "between two tests")
    return ", ".join(parts)


def run_steps(steps: Sequence[Step], output: Path, budget_s: float = BUDGET_S) -> list[Outcome]:
    """Runs the steps until the time is up; steps that were not run count as failed.

    What a step leaves of its limit goes to those after it.
    """
    output.mkdir(parents=True, exist_ok=True)
    for log in {step.log for step in steps}:
        (output / log).unlink(missing_ok=True)
    start, allowed = time.monotonic(), 0.0
    outcomes: list[Outcome] = []
    broken = ""
    for step in steps:
        allowed = min(allowed + step.limit_s, budget_s)
        left = start + allowed - time.monotonic()
        if broken or left < 1:
            outcome = Outcome(step, "FAILED", remark=f"not run: {broken or 'out of time'}")
        else:
            print(f"{step.name} ...", flush=True)
            outcome = run_step(step, output, left)
            print(f"  {outcome.verdict} in {outcome.seconds:.1f} s. {outcome.remark}", flush=True)
            _print_failures(outcome.failures)
        outcomes.append(outcome)
        if step.essential and outcome.verdict == "FAILED":
            broken = f"{step.name} failed"
    return outcomes


def _print_failures(failures: Sequence[str]) -> None:
    for line in failures[:SHOWN_FAILURES]:
        print(f"    {line}", flush=True)
    if len(failures) > SHOWN_FAILURES:
        print(f"    and {len(failures) - SHOWN_FAILURES} more", flush=True)


def format_table(outcomes: Sequence[Outcome]) -> str:
    """One line for each step, and the verdict over all."""
    lines = [f"{'step':<24} {'verdict':<14} {'time':>7}  remark"]
    lines += [
        f"{o.step.name:<24} {o.verdict:<14} {o.seconds:>5.1f} s  {o.remark}".rstrip()
        for o in outcomes
    ]
    failed = sum(o.verdict == "FAILED" for o in outcomes)
    passed = sum(o.verdict == "passed" for o in outcomes)
    lines.append(f"{passed} passed, {failed} failed, {len(outcomes) - passed - failed} unavailable")
    return "\n".join(lines)


def format_targets(output: Path) -> str:
    """The verdicts on the targets that the results in ``output`` allow."""
    from benchmarks.reports import targets

    found, notes = read_results(output, HEAD_BENCHMARKS)
    if not found:
        return "\n".join([*notes, "no benchmark results: no target was measured"])
    return "\n".join([*notes, targets.format_verdicts(targets.judge(list(found.values())))])


def read_results(output: Path, names: Iterable[str]) -> tuple[dict[str, Results], list[str]]:
    """The results that are there, by file, and why others cannot be read."""
    from benchmarks.reports import results

    found, notes = {}, []
    for name in names:
        if (output / name).is_file():
            try:
                found[name] = results.read(output / name)
            except results.ResultsError as error:  # stopped while it wrote
                notes.append(str(error))
    return found, notes


def format_left_out(outcomes: Sequence[Outcome], output: Path) -> str:
    """What this run does not tell: steps, tests and rows of benchmarks that have no result."""
    lines = [
        f"{o.step.name}: {o.remark}"
        for o in outcomes
        if o.verdict == "not available" or o.remark.startswith(("not run", "stopped"))
    ]
    for o in outcomes:
        lines += [f"{o.step.name}: skipped: {reason}" for reason in o.skipped]
    found, _ = read_results(output, (*HEAD_BENCHMARKS, *OPERATOR_BENCHMARKS))
    for name, run in found.items():
        absent = [row for row in run.rows if row.status not in ("ok", "wrong")]
        if absent:
            what = "; ".join(dict.fromkeys(f"{row.implementation}: {row.remark}" for row in absent))
            lines.append(f"{name}: {len(absent)} rows without a number ({what})")
    if find_spec("torchvision") is None:
        lines.append("benchmarks: torchvision is not installed, with which ours is compared")
    lines.append(
        "always: other shapes and batches (python -m benchmarks), other GPUs, several GPUs"
    )
    return "\n".join(["left out:", *(f"  {line}" for line in lines)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args(argv)

    try:
        import torch

        from dyhead_cuda.archs import target_of
    except ImportError as error:
        print(
            f"gpu-check: expected torch and numpy in {sys.executable}, but {error}; run make venv "
            "where there is a network, or name a Python that has them: "
            "make gpu-check VENV=none PYTHON=/path/to/python",
            file=sys.stderr,
        )
        return 2

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    archs = sorted({target_of(torch.cuda.get_device_capability(gpu)) for gpu in gpus})
    sanitizer = find_sanitizer()
    output = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
    if arguments.dry_run:
        if not archs:
            print("no GPU here; for a compute capability of 9.0 the steps would be:")
        for step in steps_for(archs or ["90a"], sanitizer, output):
            variables = [f"{name}={shlex.quote(value)}" for name, value in step.environment.items()]
            note = f"  # not available: {step.unavailable}" if step.unavailable else ""
            command = shlex.join(step.command_within(step.limit_s))
            print(" ".join([*variables, command]) + note)
        return 0
    if not archs:
        print(
            f"gpu-check: expected a CUDA GPU, but torch {torch.__version__} sees none; run it on a "
            "machine with a GPU and a CUDA build of torch, or see the steps with --dry-run",
            file=sys.stderr,
        )
        return 2
    names = ", ".join(torch.cuda.get_device_name(gpu) for gpu in gpus)
    for name in (*HEAD_BENCHMARKS, *OPERATOR_BENCHMARKS):
        (output / name).unlink(missing_ok=True)
    outcomes = run_steps(steps_for(archs, sanitizer, output), output)
    table = f"{names}; torch {torch.__version__}\n{format_table(outcomes)}"
    table += f"\n\n{format_targets(output)}\n\n{format_left_out(outcomes, output)}"
    print(table)
    (output / "summary.txt").write_text(table + "\n")
    return int(any(outcome.verdict == "FAILED" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

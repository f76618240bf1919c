"""``make gpu-check``: builds for the GPU that is here, measures, tests, and runs the sanitizers.

Uses the Python that runs it and installs nothing. Logs and results go below ``$OUT``, or
``build/gpu-check`` if that is not set; the last thing printed is which of the project's targets
were reached. Exit status: 0 if everything passed (a missed target is no failure), 1 if not, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 520.0  # under nine minutes, with room for the start of Python
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# Options of the benchmarks by the file that each writes; --seconds limits when it starts work.
_PEERS = ("--peers", "torchvision", "layers", "dense")
HEAD_BENCHMARKS = {
    "head-batch8.json": (
        *("--only", "head", "--batch", "8", "--dtype", "bfloat16", *_PEERS, "compile"),
        *("--seconds", "110"),
    ),
    "head-batch1.json": (
        *("--only", "head", "--batch", "1", "--dtype", "bfloat16", "float32", *_PEERS),
        *("--graph", "--seconds", "40"),
    ),
}
OPERATOR_BENCHMARKS = {
    "operators.json": (
        *("--only", "block", "branches", "block_coefficients", "fuse_branches", "pack_levels"),
        *("dynamic_relu", "offset_conv", "deform_conv", "spatial_attention"),
        *("--batch", "8", "--dtype", "bfloat16", *_PEERS, "--seconds", "40"),
    )
}
NO_SUCH_TOOL = "compute-sanitizer is not on PATH"


@dataclass(frozen=True)
class Step:
    """One command, whose output is appended to ``log``."""

    name: str
    command: list[str]
    limit_s: float
    log: str
    environment: Mapping[str, str] = field(default_factory=dict)
    essential: bool = False  # skip everything after it if it fails
    unavailable: str = ""  # why it cannot run here, which is no failure


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: Step
    verdict: str  # "passed", "FAILED" or "not available"
    seconds: float = 0.0
    remark: str = ""


def _benchmarks(options: Mapping[str, Sequence[str]], output: Path) -> list[Step]:
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--shapes", "glip"]
    return [
        Step(
            f"benchmark {Path(name).stem}",
            [*command, *chosen, "--json", str(output / name)],
            int(chosen[-1]) + 30,
            "benchmarks.log",
        )
        for name, chosen in options.items()
    ]


def steps_for(archs: Sequence[str], sanitizer: str | None, output: Path) -> list[Step]:
    """All steps, in order: those that measure the targets come first.

    Args:
        archs: the entries of DYHEAD_CUDA_ARCHS to build for.
        sanitizer: the compute-sanitizer program; None if there is none.
        output: the directory for results.
    """
    # Sanitizers name the source lines.
    build = {
        "DYHEAD_CUDA_ARCHS": ";".join(archs),
        "DYHEAD_REQUIRE": "cpu,cuda",
        "DYHEAD_LINEINFO": "on",
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    steps = [
        Step(
            "build",
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            240,
            "build.log",
            build,
            essential=True,
        ),
        Step("info", [sys.executable, "-m", "dyhead_cuda", "info"], 60, "build.log"),
        Step("check", [sys.executable, "-m", "dyhead_cuda", "check"], 60, "build.log"),
        *_benchmarks(HEAD_BENCHMARKS, output),
        Step("tests", [*pytest, "tests", "-m", "gpu"], 210, "tests.log"),
    ]
    for tool in SANITIZERS:
        # Without this, torch packs tensors into one allocation, which hides reads past their ends.
        steps.append(
            Step(
                tool,
                [
                    *(sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "3"),
                    *("--kernel-name", "kns=dyhead"),
                    *(*pytest, "tests/gpu", "tests/ops", "-m", "sanitize"),
                ],
                60,
                "sanitizer.log",
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                unavailable="" if sanitizer else NO_SUCH_TOOL,
            )
        )
    return [*steps, *_benchmarks(OPERATOR_BENCHMARKS, output)]


def run_command(step: Step, log: IO[bytes], limit_s: float) -> int | None:
    """The exit status; None if the command, with all its children, had to be killed."""
    try:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, **step.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"{error}\n".encode())
        return 127
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_step(step: Step, output: Path, limit_s: float) -> Outcome:
    """Runs one step for at most ``limit_s`` seconds."""
    if step.unavailable:
        return Outcome(step, "not available", remark=step.unavailable)
    start = time.monotonic()
    with (output / step.log).open("ab") as log:
        log.write(f"$ {shlex.join(step.command)}\n".encode())
        log.flush()
        offset = log.tell()
        status = run_command(step, log, limit_s)
    seconds = time.monotonic() - start
    said = (output / step.log).read_bytes()[offset:].decode(errors="replace")
    if status is None:
        return Outcome(step, "FAILED", seconds, f"stopped after {limit_s:.0f} s")
    if status != 0 and step.name in SANITIZERS and "Device not supported" in said:
        return Outcome(step, "not available", seconds, "compute-sanitizer refuses this device")
    lines = [line.strip("= \t") for line in said.splitlines() if line.strip("= \t")]
    remark = lines[-1] if lines else ""
    if status != 0:
        return Outcome(step, "FAILED", seconds, f"exit status {status}: {remark}; see {step.log}")
    if step.name in SANITIZERS and not re.search(r"SUMMARY: 0 (errors|hazards)", said):
        return Outcome(step, "FAILED", seconds, f"no error summary; see {step.log}")
    return Outcome(step, "passed", seconds, remark if step.name in ("tests", *SANITIZERS) else "")


def run_steps(steps: Sequence[Step], output: Path, budget_s: float = BUDGET_S) -> list[Outcome]:
    """Runs the steps until the time is up; steps that were not run count as failed."""
    output.mkdir(parents=True, exist_ok=True)
    for log in {step.log for step in steps}:
        (output / log).unlink(missing_ok=True)
    deadline = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    broken = ""
    for step in steps:
        left = deadline - time.monotonic()
        if broken or left < 1:
            outcome = Outcome(step, "FAILED", remark=f"not run: {broken or 'out of time'}")
        else:
            print(f"{step.name} ...", flush=True)
            outcome = run_step(step, output, min(step.limit_s, left))
            print(f"  {outcome.verdict} in {outcome.seconds:.1f} s. {outcome.remark}", flush=True)
        outcomes.append(outcome)
        if step.essential and outcome.verdict == "FAILED":
            broken = f"{step.name} failed"
    return outcomes


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
    from benchmarks.reports import results, targets

    found = [output / name for name in HEAD_BENCHMARKS if (output / name).is_file()]
    if not found:
        return "no benchmark results: no target was measured"
    return targets.format_verdicts(targets.judge([results.read(path) for path in found]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args(argv)

    import torch

    from dyhead_cuda.archs import target_of

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    archs = sorted({target_of(torch.cuda.get_device_capability(gpu)) for gpu in gpus})
    sanitizer = shutil.which("compute-sanitizer")
    output = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
    if arguments.dry_run:
        if not archs:
            print("no GPU here; for a compute capability of 9.0 the steps would be:")
        for step in steps_for(archs or ["90a"], sanitizer, output):
            variables = [f"{name}={shlex.quote(value)}" for name, value in step.environment.items()]
            note = f"  # not available: {step.unavailable}" if step.unavailable else ""
            print(" ".join([*variables, shlex.join(step.command)]) + note)
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
    table += f"\n\n{format_targets(output)}"
    print(table)
    (output / "summary.txt").write_text(table + "\n")
    return int(any(outcome.verdict == "FAILED" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

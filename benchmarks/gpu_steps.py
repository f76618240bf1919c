"""What ``make gpu-check`` runs, in which order, and how long each step may take."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

BUDGET_S = 520  # under nine minutes, with room for the start of Python; the limits add up to it
LIMITS_S = {
    "build": 110,
    "info": 10,
    "check": 45,
    "benchmark head-batch8": 65,
    "benchmark head-batch1": 35,
    "tests": 80,
    "memcheck": 25,
    "racecheck": 25,
    "initcheck": 20,
    "wgmma": 20,
    "benchmark head-wgmma": 30,
    "benchmark operators": 25,
    "benchmark head-compiled": 30,
}
# Of a benchmark's limit: for its start, and for what is measured when it may start nothing more.
MARGIN_S = 15
SANITIZERS = ("memcheck", "racecheck", "initcheck")
WORKERS = 4  # processes that share the GPU in the tests; most of these are small
# A kernel that breaks the GPU's context makes every later test of its process fail.
MAX_FAILURES = 30
# A step of its own.
RUN_BY_CHECK = "tests/commands/test_check.py::test_everything_is_right_on_the_gpu"
# Options of the benchmarks by the file that each writes.
_PEERS = ("--peers", "torchvision", "layers", "dense")
HEAD_BENCHMARKS = {
    "head-batch8.json": ("--only", "head", "--batch", "8", "--dtype", "bfloat16", *_PEERS),
    "head-batch1.json": (
        *("--only", "head", "--batch", "1", "--dtype", "bfloat16", "float32", *_PEERS),
        "--graph",
    ),
    # By itself, as nobody knows how long the compiler takes.
    "head-compiled.json": (
        *("--only", "head", "--batch", "8", "--dtype", "bfloat16", "--peers", "compile"),
    ),
}
# Our forward alone, where it may take the kernel with wgmma; the table is in the log.
WGMMA_BENCHMARK = ("--only", "head", "--batch", "1", "8", "--dtype", "bfloat16", "--peers")
WGMMA = {"DYHEAD_CUDA_MMA": "wgmma"}
OPERATOR_BENCHMARKS = {
    "operators.json": (
        *("--only", "block", "branches", "block_coefficients", "fuse_branches", "pack_levels"),
        *("dynamic_relu", "offset_conv", "deform_conv", "spatial_attention"),
        *("--batch", "8", "--dtype", "bfloat16", *_PEERS),
    )
}
NO_WGMMA = "no GPU here has compute capability 9.0"
NO_SUCH_TOOL = "compute-sanitizer is not on PATH, nor in bin of CUDA_HOME or /usr/local/cuda"
LIBRARY = ("torch", "numpy")
BENCHMARK = (*LIBRARY, "rich", "matplotlib")
PYTEST = (*LIBRARY, "pytest", "hypothesis")


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
    needs: Sequence[str] = ()  # modules without which it fails
    is_benchmark: bool = False  # it is told after how many seconds to start nothing more

    def command_within(self, limit_s: float) -> list[str]:
        """The command, which is to end within ``limit_s`` seconds."""
        if not self.is_benchmark:
            return self.command
        return [*self.command, "--seconds", str(max(1, int(limit_s - MARGIN_S)))]

    @property
    def missing(self) -> list[str]:
        """Those of ``needs`` that this Python lacks."""
        return [name for name in self.needs if find_spec(name) is None]


def steps_for(archs: Sequence[str], sanitizer: str | None, output: Path) -> list[Step]:
    """All steps, in order: those that measure the targets come first.

    Args:
        archs: the entries of DYHEAD_CUDA_ARCHS to build for.
        sanitizer: the compute-sanitizer program; None if there is none.
        output: the directory for results.
    """
    build = {
        "DYHEAD_CUDA_ARCHS": ";".join(archs),
        "DYHEAD_REQUIRE": "cpu,cuda",
        "DYHEAD_LINEINFO": "on",  # sanitizers name the source lines
        "MAX_JOBS": str(cores()),
    }
    package = [sys.executable, "-m", "dyhead_cuda"]
    return [
        Step(
            "build",
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            LIMITS_S["build"],
            "build.log",
            build,
            essential=True,
            needs=("setuptools", *LIBRARY),
        ),
        Step("info", [*package, "info"], LIMITS_S["info"], "build.log", needs=LIBRARY),
        Step(
            *("check", [*package, "check", "--device", "cuda"], LIMITS_S["check"], "build.log"),
            needs=LIBRARY,
        ),
        *(_benchmark(HEAD_BENCHMARKS, name, output) for name in ("head-batch8", "head-batch1")),
        _tests(),
        *(_sanitized(tool, sanitizer) for tool in SANITIZERS),
        # By themselves: a kernel that hangs must not take other tests with it.
        _wgmma_tests(archs),
        _wgmma_benchmark(archs),
        _benchmark(OPERATOR_BENCHMARKS, "operators", output),
        _benchmark(HEAD_BENCHMARKS, "head-compiled", output),
    ]


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or beside nvcc where setup.py finds that."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _benchmark(options: Mapping[str, Sequence[str]], name: str, output: Path) -> Step:
    file, step = f"{name}.json", f"benchmark {name}"
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--shapes", "glip"]
    written = ["--json", str(output / file)]
    return Step(
        *(step, [*command, *options[file], *written], LIMITS_S[step], "benchmarks.log"),
        needs=BENCHMARK,
        is_benchmark=True,
    )


def _pytest(*arguments: str) -> list[str]:
    """Says what it begins, so that the log names the test that hangs."""
    options = ["-v", "--tb=short", f"--maxfail={MAX_FAILURES}", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def _tests() -> Step:
    shared = ("-n", str(WORKERS), "--dist", "loadgroup") if find_spec("xdist") else ()
    # A module that cannot be imported here must not keep the others from running.
    options = ("--continue-on-collection-errors", "--deselect", RUN_BY_CHECK)
    return Step(
        "tests",
        _pytest("tests", "-m", "gpu and not wgmma", *shared, *options),
        LIMITS_S["tests"],
        "tests.log",
        {"OMP_NUM_THREADS": str(max(1, cores() // WORKERS))},
        needs=PYTEST,
    )


def _wgmma_tests(archs: Sequence[str]) -> Step:
    return Step(
        *("wgmma", _pytest("tests/gpu/test_wgmma.py"), LIMITS_S["wgmma"], "tests.log"),
        unavailable="" if "90a" in archs else NO_WGMMA,
        needs=PYTEST,
    )


def _wgmma_benchmark(archs: Sequence[str]) -> Step:
    step = "benchmark head-wgmma"
    command = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--shapes", "glip"]
    return Step(
        *(step, [*command, *WGMMA_BENCHMARK], LIMITS_S[step], "benchmarks.log"),
        WGMMA,
        unavailable="" if "90a" in archs else NO_WGMMA,
        needs=BENCHMARK,
        is_benchmark=True,
    )


def _sanitized(tool: str, sanitizer: str | None) -> Step:
    # What a kernel wrote that was not watched is uninitialised to initcheck, so it watches all.
    alone = tool == "initcheck"
    watched = () if alone else ("--kernel-name", "kns=dyhead")
    return Step(
        tool,
        [
            *(sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "3", *watched),
            *_pytest("tests/gpu/test_sanitized.py", "-m", "initcheck" if alone else "sanitize"),
        ],
        LIMITS_S[tool],
        "tests.log",
        # Without this, torch packs tensors into one allocation, which hides reads past their ends.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        unavailable="" if sanitizer else NO_SUCH_TOOL,
        needs=PYTEST,
    )

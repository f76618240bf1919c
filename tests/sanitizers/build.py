"""Builds the CPU library for a sanitizer, and says how a process runs with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.helpers.paths import ROOT

EXIT = 99  # of a process that a sanitizer stopped
OPTIONS = f"exitcode={EXIT}:halt_on_error=1"
# Leaks are those of Python. A result of many gigabytes is an error, as on a small machine.
ADDRESS = f"{OPTIONS}:detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096"


@dataclass(frozen=True)
class Sanitizer:
    """One that the CPU library can be built for.

    Args:
        name: of DYHEAD_INSTRUMENT.
        runtimes: that must be loaded before Python.
        flags: of the compiler.
        options: of the runtime, by environment variable.
        finds: functions of planted.cpp, and what is said of them.
    """

    name: str
    runtimes: tuple[str, ...]
    flags: tuple[str, ...]
    options: dict[str, str]
    finds: dict[str, str]

    @property
    def directory(self) -> Path:
        return ROOT / "build" / "instrumented" / self.name

    def environment(self) -> dict[str, str]:
        """Of a process that uses the library that was built for this sanitizer."""
        return {
            "DYHEAD_LIBRARY_DIR": str(self.directory),
            "LD_PRELOAD": " ".join(runtime(name) for name in self.runtimes),
            "OMP_NUM_THREADS": "1" if self.name == "thread" else "2",
            **self.options,
        }


ADDRESS_SANITIZER = Sanitizer(
    "address",
    ("libasan.so", "libubsan.so"),
    ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    {"ASAN_OPTIONS": ADDRESS, "UBSAN_OPTIONS": OPTIONS},
    {"overrun": "heap-buffer-overflow", "undefined": "shift exponent 40 is too large"},
)
THREAD_SANITIZER = Sanitizer(
    "thread",
    ("libtsan.so",),
    ("-fsanitize=thread",),
    {"TSAN_OPTIONS": OPTIONS},
    {"race": "ThreadSanitizer: data race"},
)
SANITIZERS = {each.name: each for each in (ADDRESS_SANITIZER, THREAD_SANITIZER)}


def compiler() -> str:
    return os.environ.get("CXX") or "g++"


def runtime(name: str) -> str:
    """The file of a sanitizer's runtime, of the compiler that builds the library."""
    command = [compiler(), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_file():
        raise RuntimeError(f"expected {name} beside {compiler()}, which has none; install GCC's")
    return found


def prefix(sanitizer: Sanitizer) -> list[str]:
    """What starts a process: ThreadSanitizer takes no randomised addresses on newer kernels."""
    setarch = shutil.which("setarch")
    return [setarch, "-R"] if sanitizer.name == "thread" and setarch else []


def build(sanitizer: Sanitizer) -> None:
    """Build the library, as far as it is not built yet."""
    environment = os.environ | {"DYHEAD_INSTRUMENT": sanitizer.name, "DYHEAD_REQUIRE": "cpu"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the library was not built: {run.stdout[-2000:]}{run.stderr[-2000:]}")


def build_planted(sanitizer: Sanitizer) -> Path:
    """planted.cpp as a library of its own, with the same instrumentation."""
    target = sanitizer.directory / "libplanted.so"
    torch_headers = Path(torch.__file__).parent / "include"
    command = [
        *(compiler(), "-std=c++20", "-O1", "-g", "-fPIC", "-shared", *sanitizer.flags),
        *("-DDYHEAD_SANITIZE_THREAD", f"-I{ROOT / 'csrc'}", f"-isystem{torch_headers}"),
        *(str(ROOT / "tests" / "sanitizers" / "planted.cpp"), "-o", str(target)),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


PROGRAM = """
import ctypes, sys, torch
library, function = sys.argv[1:]
values = torch.ones(40)
call = getattr(ctypes.CDLL(library), function)
call.restype = ctypes.c_double
print("finished", call(ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(40)))
"""


def run_planted(sanitizer: Sanitizer, function: str) -> subprocess.CompletedProcess[str]:
    """Call a function of planted.cpp in a process of its own."""
    library = str(sanitizer.directory / "libplanted.so")
    return subprocess.run(
        [*prefix(sanitizer), sys.executable, "-c", PROGRAM, library, function],
        env=os.environ | sanitizer.environment(),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )

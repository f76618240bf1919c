"""Builds the CUDA kernels for the host, whole, sanitized or with a planted bug."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

SOURCE = Path(__file__).resolve().parent
BUILDS = ROOT / "build"

# Set in subprocesses: where the Python module lies, already built.
MODULE_DIRECTORY = "DYHEAD_SIMT_MODULE_DIRECTORY"

# The exit status of a process that a sanitizer stopped; pytest's own are smaller.
SANITIZER_EXIT = 99


def compiler() -> str | None:
    """The path of g++, or None where there is none."""
    return shutil.which("g++")


def load_module() -> Any:
    """The module of all host-compiled kernels, built if need be."""
    directory = os.environ.get(MODULE_DIRECTORY) or str(_build_module())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    return importlib.import_module("dyhead_simt")


@dataclass(frozen=True)
class Kernels:
    """Kernel libraries that take the place of the module's own in a subprocess."""

    directories: tuple[Path, ...]
    sanitized: bool

    def run_python(self, code: str) -> subprocess.CompletedProcess[str]:
        """Runs Python code with these kernels: `simt` is the module, `np` is numpy."""
        prelude = (
            "import sys, numpy as np\n"
            f"sys.path.insert(0, {str(_build_module())!r})\n"
            "import dyhead_simt as simt\n"
        )
        return self._run([sys.executable, "-c", prelude + code])

    def run_pytest(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs tests with these kernels, except those that start such runs or offend sanitizers."""
        marks = "not spawns and not guards" if self.sanitized else "not spawns"
        # A sanitizer ends the process, and with it the output that pytest would capture by default.
        options = ["-q", "-m", marks, "-p", "no:cacheprovider", "--capture=sys"]
        return self._run([sys.executable, "-m", "pytest", *options, *arguments])

    def assert_noticed(self, *arguments: str) -> None:
        """One of the tests fails with these kernels, and fails as a test."""
        run = self.run_pytest("-x", *arguments)
        assert run.returncode == 1, run.stdout
        assert "1 failed" in run.stdout

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ)
        environment[MODULE_DIRECTORY] = str(_build_module())
        paths = [*map(str, self.directories), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
        if self.sanitized:
            # Python links neither library; ASan must come first to see allocations and throws.
            libraries = (_compiler_library("libasan.so"), _compiler_library("libstdc++.so.6"))
            environment["LD_PRELOAD"] = " ".join(libraries)
            environment["ASAN_OPTIONS"] = f"detect_leaks=0:exitcode={SANITIZER_EXIT}"
            environment["UBSAN_OPTIONS"] = f"print_stacktrace=1:exitcode={SANITIZER_EXIT}"
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
            check=False,
        )


def sanitized() -> Kernels:
    """All kernels and the emulation under AddressSanitizer and UndefinedBehaviorSanitizer."""
    build = BUILDS / "simt-sanitized"
    _build(build, ["simt_runtime", "kernels"], SIMT_MODULE="OFF", SIMT_SANITIZE="ON")
    return Kernels((build / "lib",), sanitized=True)


def mutate(
    file: str,
    pattern: str,
    replacement: str,
    *,
    kernel: str | None = None,
    sanitize: bool = False,
) -> Kernels:
    """Kernels with one textual change, for tests that show that tests notice it.

    Args:
        file: a file of csrc/ or tests/simt/kernels/, relative to the repository. The fields of a
            parameter struct cannot be changed: the bindings are not rebuilt.
        pattern: the text to replace; it must occur once.
        replacement: the new text.
        kernel: the .cu file, without its ending, to build with the change where `file` is a header;
            without it all that are.
        sanitize: build with sanitizers.

    Raises:
        ValueError: `pattern` does not occur exactly once.
    """
    text = (ROOT / file).read_text()
    if (found := text.count(pattern)) != 1:
        raise ValueError(
            f"{file}: expected exactly one occurrence of {pattern!r}, found {found}; "
            "adapt the pattern to the source"
        )
    changed = text.replace(pattern, replacement)
    key = hashlib.sha256(repr((file, pattern, replacement, kernel, sanitize)).encode())
    build = BUILDS / "simt-mutants" / key.hexdigest()[:16]
    tree = build / "tree"
    for part in ("csrc", "tests/simt/kernels"):
        _mirror(ROOT / part, tree / part, {ROOT / file: changed})
    if file.endswith(".cu"):
        kernel = Path(file).stem
    _build(
        build,
        [f"simt_{kernel}" if kernel else "kernels"],
        SIMT_MODULE="OFF",
        SIMT_SANITIZE="ON" if sanitize else "OFF",
        CMAKE_COMPILE_WARNING_AS_ERROR="OFF",
        SIMT_CSRC=str(tree / "csrc"),
        SIMT_KERNELS=str(tree / "tests/simt/kernels"),
    )
    others = sanitized().directories if sanitize else ()
    return Kernels((build / "lib", *others), sanitized=sanitize)


def _mirror(source: Path, target: Path, changes: dict[Path, str]) -> None:
    """Copies a tree; files that are already right stay untouched, and builds incremental."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in target.rglob("*"):
        if path.is_file() and path.relative_to(target) not in wanted:
            path.unlink()
    for name in wanted:
        content = changes[source / name].encode() if source / name in changes else None
        content = (source / name).read_bytes() if content is None else content
        copy = target / name
        if copy.exists() and copy.read_bytes() == content:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)


def _build_module() -> Path:
    if prebuilt := os.environ.get(MODULE_DIRECTORY):
        return Path(prebuilt)
    import pybind11

    build = BUILDS / "simt"
    _build(
        build,
        ["all"],
        Python_EXECUTABLE=sys.executable,
        pybind11_DIR=pybind11.get_cmake_dir(),
    )
    return build / "lib"


def _build(build: Path, targets: list[str], **variables: str) -> None:
    build.mkdir(parents=True, exist_ok=True)
    with _locked(build / "lock"):
        configure = [_tool("cmake"), "-G", "Ninja", "-S", str(SOURCE), "-B", str(build)]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}")
        configure.append(f"-DCMAKE_CXX_COMPILER={compiler()}")
        configure += [f"-D{name}={value}" for name, value in variables.items()]
        stamp = build / "configured"
        if not stamp.exists() or stamp.read_text() != repr(configure):
            _call(configure)
            stamp.write_text(repr(configure))
        _call([_tool("ninja"), "-C", str(build), *targets])


def _call(command: list[str]) -> None:
    result = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}")


def _tool(name: str) -> str:
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is needed to build the kernels: pip install {name}")
    return found


def _compiler_library(name: str) -> str:
    command = [compiler() or "g++", f"-print-file-name={name}"]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

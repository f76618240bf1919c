"""Builds the CUDA kernels for the host, whole, sanitized, counting or with a planted bug."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

from .server import MODULE_DIRECTORY, Run, Server

SOURCE = Path(__file__).resolve().parent
BUILDS = ROOT / "build"

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
    """A folder with the module and all kernel libraries, some of them built in another way."""

    directory: Path
    sanitized: bool

    def run_python(self, code: str) -> Run:
        """Runs Python code with these kernels: `simt` is the module, `np` is numpy."""
        return self._server().run_python(self.directory, code)

    def run_pytest(self, *arguments: str) -> Run:
        """Runs tests with these kernels, except those that start such runs or offend sanitizers."""
        marks = "not spawns and not guards" if self.sanitized else "not spawns"
        return self._server().run_pytest(self.directory, "-m", marks, *arguments)

    def assert_noticed(self, *arguments: str) -> None:
        """One of the tests fails with these kernels, as a test or by a wild access to memory."""
        run = self.run_pytest("-x", *arguments)
        crashed = "Fatal Python error: Segmentation fault" in run.stdout
        assert crashed or (run.returncode == 1 and "1 failed" in run.stdout), run.stdout

    def _server(self) -> Server:
        if not self.sanitized:
            return Server.of(())
        # Python links neither library; ASan must come first to see allocations and throws.
        libraries = (_compiler_library("libasan.so"), _compiler_library("libstdc++.so.6"))
        return Server.of(
            (
                ("LD_PRELOAD", " ".join(libraries)),
                ("ASAN_OPTIONS", f"detect_leaks=0:exitcode={SANITIZER_EXIT}"),
                ("UBSAN_OPTIONS", f"print_stacktrace=1:exitcode={SANITIZER_EXIT}"),
            )
        )


def sanitized() -> Kernels:
    """The kernels and the emulation under AddressSanitizer and UndefinedBehaviorSanitizer.

    Those that compute in float16 are built without: they are those in bfloat16 but for conversions.
    """
    build = BUILDS / "simt-sanitized"
    targets = [f"kernels_{name}" for name in ("bfloat16", "tf32", "float32", "float64")]
    _build(build, ["simt_runtime", *targets], SIMT_MODULE="OFF", SIMT_SANITIZE="ON")
    _link_others(build / "lib", _build_module())
    return Kernels(build / "lib", sanitized=True)


def counted(*kernels: str, arithmetic: str = "") -> Kernels:
    """All kernels, some of them built for counting.

    Args:
        kernels: those, as .cu files without their ending; by default all.
        arithmetic: instead, what calls in ``"bfloat16"``, ``"tf32"`` or another arithmetic launch.
    """
    build = BUILDS / "simt-counted"
    every = f"kernels_{arithmetic}" if arithmetic else "kernels"
    targets = [f"simt_{name}" for name in kernels] or [every]
    _build(build, ["simt_runtime", *targets], SIMT_MODULE="OFF", SIMT_COUNT="ON")
    _link_others(build / "lib", _build_module())
    return Kernels(build / "lib", sanitized=False)


def mutate(
    file: str,
    pattern: str,
    replacement: str,
    *,
    kernel: str | None = None,
    sanitize: bool = False,
    count: bool = False,
    optimize: bool = True,
) -> Kernels:
    """Kernels with one textual change, for tests that show that tests notice it.

    Args:
        file: a file of csrc/ or tests/simt/kernels/, relative to the repository. The fields of a
            parameter struct cannot be changed: the bindings are not rebuilt.
        pattern: the text to replace; it must occur once.
        replacement: the new text.
        kernel: the .cu file, without its ending, to build with the change where `file` is a header.
        sanitize: build with sanitizers.
        count: build for counting.
        optimize: whether to compile as the unchanged kernel is, or in less time for longer runs.

    Raises:
        ValueError: `pattern` does not occur exactly once, or `file` is a header and `kernel` is
            missing.
    """
    text = (ROOT / file).read_text()
    if (found := text.count(pattern)) != 1:
        raise ValueError(
            f"{file}: expected exactly one occurrence of {pattern!r}, found {found}; "
            "adapt the pattern to the source"
        )
    if file.endswith(".cu"):
        kernel = Path(file).stem
    if kernel is None:
        raise ValueError(f"{file}: expected the kernel to build with this header, got None")
    if sanitize:
        unchanged = sanitized().directory
    else:
        unchanged = counted(kernel).directory if count else _build_module()
    change = repr((file, pattern, replacement, kernel, sanitize, count, optimize))
    build = BUILDS / "simt-mutants" / hashlib.sha256(change.encode()).hexdigest()[:16]
    build.mkdir(parents=True, exist_ok=True)
    with _locked(build / "lock"):
        changed = text.replace(pattern, replacement)
        _build_mutant(build, unchanged, kernel, file, changed, optimize)
    return Kernels(build / "lib", sanitized=sanitize)


def _build_mutant(
    build: Path, unchanged: Path, kernel: str, file: str, changed: str, optimize: bool
) -> None:
    """Builds one library as in the build of the folder `unchanged`, but with `changed` in `file`.

    CMake takes longer to configure a folder than most kernels take to compile: its command is used.
    """
    library = f"libsimt_{kernel}.so"
    commands = json.loads((unchanged.parent / "compile_commands.json").read_text())
    (command,) = (c["command"] for c in commands if Path(c["file"]).stem == kernel)
    tree = build / "tree"
    words = [word.replace(f"{ROOT}/csrc", f"{tree}/csrc") for word in shlex.split(command)]
    words = [word.replace(f"{SOURCE}/kernels", f"{tree}/kernels") for word in words]
    if not optimize:
        words[words.index("-O2")] = "-O0"
    # A planted bug may leave things unused.
    compiled = str(build / "kernel.o")
    words[words.index("-o") :] = ["-Wno-error", "-c", words[-1], "-o", compiled]
    # A counting kernel takes the functions that -fsanitize=thread calls from the runtime.
    linked = [word for word in words if word.startswith("-fsanitize") and "thread" not in word]
    linked = [words[0], *linked, "-shared", "-Wl,-Bsymbolic", compiled, "-o"]
    linked.append(str(build / "lib" / library))
    # The same sources make the same library.
    state = hashlib.sha256(repr((words, linked, changed)).encode())
    state.update((unchanged / library).read_bytes())
    stamp = build / "built"
    if stamp.exists() and stamp.read_text() == state.hexdigest():
        return
    for part in (tree, build / "lib"):
        shutil.rmtree(part, ignore_errors=True)
    (build / "lib").mkdir()
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(SOURCE / "kernels", tree / "kernels")
    (tree / file.removeprefix("tests/simt/")).write_text(changed)
    _call(words)
    _call(linked)
    _link_others(build / "lib", unchanged)
    stamp.write_text(state.hexdigest())


def _link_others(directory: Path, others: Path) -> None:
    """Links to the libraries of another folder that this one lacks: together they are a module."""
    for library in others.glob("*.so"):
        with suppress(FileExistsError):
            (directory / library.name).symlink_to(library.resolve())


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

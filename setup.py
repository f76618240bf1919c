"""Builds the native libraries with CMake and packs them; metadata lives in pyproject.toml.

``pip install .``, ``pip install -e .`` and ``python setup.py build_ext --inplace`` all leave the
same files in ``dyhead_cuda/lib/``: ``libdyhead_cpu.so``, ``libdyhead_cuda.so`` and ``build.json``,
which tells what was built how, and why something was not. A library that cannot be built does not
fail the installation, unless ``DYHEAD_REQUIRE`` names it.

Environment:

* ``DYHEAD_REQUIRE``: libraries that must be built, e.g. ``cpu`` or ``cpu,cuda``.
* ``DYHEAD_CUDA=off``: do not build the CUDA library. ``DYHEAD_CUDA=local``: build it for the GPUs
  of this machine alone, and where there is none leave it as it is; ``make demo`` does that.
* ``DYHEAD_CUDA_ARCHS``: compute capabilities, separated by semicolons, e.g. ``80;90a``; by default
  those of ``cmake/cuda_archs.cmake`` that nvcc knows, and those of the GPUs of this machine.
* ``DYHEAD_INSTRUMENT``: build the CPU library alone, into ``build/instrumented/<name>``: for a
  sanitizer, ``address`` or ``thread`` (docs/reliability/README.md), or to record how long each task
  takes, ``tasks`` (docs/performance.md).
* ``DYHEAD_WERROR=on``: warnings are errors. ``DYHEAD_LINEINFO=on``: the CUDA library knows its
  source lines, for profilers and compute-sanitizer.
* ``DYHEAD_TORCH_INTERFACE``: ``stable`` or ``classic``, which of torch's C++ interfaces to compile
  against; by default stable where torch has it, from 2.10 on (``cmake/torch_interface.cmake``).
* ``CMAKE_TOOLCHAIN_FILE``: as CMake reads it, to compile for another machine (tests/aarch64).
* ``CXX``, ``CUDACXX``: the C++ compiler and nvcc; ``CUDAHOSTCXX``: the compiler that nvcc uses, if
  it does not take ``CXX``; ``MAX_JOBS``: compile jobs at a time.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("cpu", "cuda")
INSTRUMENT = os.environ.get("DYHEAD_INSTRUMENT", "")
LOG_TAIL_LINES = 40


class NotBuilt(Exception):
    """Why a library was not built; ``log`` is what the tool that failed said."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.log_tail = log.splitlines()[-LOG_TAIL_LINES:]


@dataclass(frozen=True)
class Torch:
    """The torch package to build against; read from its files, since importing it takes seconds."""

    directory: Path
    version: str
    cuda: str | None

    @classmethod
    def find(cls) -> Torch:
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.origin is not None:
            directory = Path(spec.origin).parent
        else:  # pip builds without the packages of the environment, but with its Python
            directory = Path(sysconfig.get_path("platlib")) / "torch"
        if not (directory / "version.py").is_file():
            raise NotBuilt(
                f"torch is not installed for {sys.executable}: install it first, then run "
                "pip install --no-build-isolation --force-reinstall --no-deps with the sources"
            )
        version = runpy.run_path(str(directory / "version.py"))
        return cls(directory, str(version["__version__"]), version["cuda"])


def required_libraries() -> set[str]:
    names = {name.strip() for name in os.environ.get("DYHEAD_REQUIRE", "").split(",")} - {""}
    if not names <= set(LIBRARIES):
        raise SystemExit(f"DYHEAD_REQUIRE: expected names out of {LIBRARIES}, got {sorted(names)}")
    return names


def find_tool(name: str) -> str:
    """The program ``name`` (cmake or ninja): that of the Python package, else the system's."""
    program = None
    if importlib.util.find_spec(name) is not None:
        package = importlib.import_module(name)
        directory = getattr(package, "CMAKE_BIN_DIR" if name == "cmake" else "BIN_DIR", None)
        program = shutil.which(name, path=directory) if directory else None
    program = program or shutil.which(name)
    if program is None:
        raise NotBuilt(f"{name} not found: run pip install {name}")
    return program


def find_program(variable: str, candidates: list[str], meaning: str) -> str:
    """The program that the environment variable names, else the first candidate that exists."""
    chosen = os.environ.get(variable)
    for candidate in [chosen] if chosen else candidates:
        program = shutil.which(candidate)
        if program is not None:
            return program
    if chosen:
        raise NotBuilt(f"no {meaning}: {variable}={chosen} is not a program; correct or unset it")
    raise NotBuilt(f"no {meaning} found: install one, or set {variable} to it")


def setting(variable: str, default: str, *others: str) -> str:
    """What an environment variable says that is "on" or "off", or one of the others."""
    value = os.environ.get(variable) or default
    if value not in ("on", "off", *others):
        raise NotBuilt(f"{variable}: expected {', '.join(('on', *others))} or off, got {value!r}")
    return value


def find_nvcc(torch: Torch) -> str:
    if INSTRUMENT:
        raise NotBuilt("DYHEAD_INSTRUMENT is for the CPU library")
    wanted = setting("DYHEAD_CUDA", "on", "local")
    if wanted == "off":
        raise NotBuilt("switched off by DYHEAD_CUDA=off")
    if wanted == "local" and not local_archs():
        raise NotBuilt(
            "DYHEAD_CUDA=local is for the GPUs of this machine, and it has none that the kernels "
            "run on; run make build for all of them"
        )
    if torch.cuda is None:
        raise NotBuilt(f"torch {torch.version} has no CUDA: install a CUDA build of torch")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [f"{home}/bin/nvcc" for home in homes] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = find_program("CUDACXX", candidates, "CUDA compiler (nvcc)")
    version = run([nvcc, "--version"], "nvcc --version").rpartition("release ")[2].split(",")[0]
    if version.split(".")[0] != torch.cuda.split(".")[0]:
        raise NotBuilt(
            f"nvcc {version} ({nvcc}) does not fit torch {torch.version}, built for CUDA "
            f"{torch.cuda}: the major versions must be equal; set CUDACXX to a matching nvcc"
        )
    return nvcc


@cache
def local_archs() -> list[str]:
    """The entries of DYHEAD_CUDA_ARCHS for the GPUs of this machine that the kernels run on."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    archs = runpy.run_path(str(ROOT / "dyhead_cuda" / "archs.py"))
    found = re.findall(r"^(\d+)\.(\d+)$", answer.stdout, re.MULTILINE)
    capabilities = {(int(major), int(minor)) for major, minor in found}
    return [archs["target_of"](c) for c in sorted(capabilities) if c >= archs["MINIMUM"]]


def run(command: list[str], meaning: str, progress: bool = False) -> str:
    """What a command prints, on both streams; with ``progress`` it is also shown as it comes."""
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if progress and line.startswith("["):
                print(line, end="", flush=True)
    log = "".join(lines)
    if process.returncode != 0:
        reason = f"{meaning} failed with exit status {process.returncode}"
        error = first_error(log)
        raise NotBuilt(f"{reason}: {error}" if error else reason, log)
    return log


def first_error(log: str) -> str:
    """The first line of a log that speaks of an error, and the next one if it only announces."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if re.search(r"\berror\b", line, re.IGNORECASE):
            return " ".join(lines[index : index + 2]) if line.endswith(":") else line
    return ""


def configure_arguments(name: str, torch: Torch) -> list[str]:
    compiler = find_program("CXX", ["c++", "g++", "clang++"], "C++ compiler")
    arguments = [
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DDYHEAD_LIBRARY={name}",
        f"-DDYHEAD_TORCH_DIR={torch.directory}",
        f"-DDYHEAD_TORCH_INTERFACE={os.environ.get('DYHEAD_TORCH_INTERFACE', '')}",
        f"-DDYHEAD_WERROR={setting('DYHEAD_WERROR', 'off')}",
    ]
    if INSTRUMENT:
        arguments.append(f"-DDYHEAD_INSTRUMENT={INSTRUMENT}")
    if os.environ.get("CMAKE_TOOLCHAIN_FILE"):  # said here so that another one configures anew
        arguments.append(f"-DCMAKE_TOOLCHAIN_FILE={os.environ['CMAKE_TOOLCHAIN_FILE']}")
    if name == "cuda":
        arguments.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc(torch)}")
        host_compiler = os.environ.get("CUDAHOSTCXX", compiler)
        arguments.append(f"-DCMAKE_CUDA_HOST_COMPILER={host_compiler}")
        arguments.append(f"-DDYHEAD_LINEINFO={setting('DYHEAD_LINEINFO', 'off')}")
        if os.environ.get("DYHEAD_CUDA_ARCHS"):
            arguments.append(f"-DDYHEAD_CUDA_ARCHS={os.environ['DYHEAD_CUDA_ARCHS']}")
        elif setting("DYHEAD_CUDA", "on", "local") == "local":
            arguments.append(f"-DDYHEAD_CUDA_ARCHS={';'.join(local_archs())}")
        else:
            arguments.append(f"-DDYHEAD_CUDA_LOCAL_ARCHS={';'.join(local_archs())}")
    return arguments


def build_library(name: str, torch: Torch) -> tuple[Path, dict[str, Any]]:
    """Builds one library below build/; returns its file and what to record of it."""
    cmake = find_tool("cmake")
    part = f"{name}-{INSTRUMENT}" if INSTRUMENT else name
    directory = ROOT / "build" / f"torch-{torch.version}" / part
    configured = directory / "configured.json"
    command = [cmake, "-S", str(ROOT), "-B", str(directory), *configure_arguments(name, torch)]
    stamp = json.dumps(command)
    if not configured.exists() or configured.read_text() != stamp:
        # CMake keeps a compiler once found: another one needs a new cache. Objects stay.
        configured.unlink(missing_ok=True)
        (directory / "CMakeCache.txt").unlink(missing_ok=True)
        run(command, "cmake (configuring)")
        configured.write_text(stamp)
    jobs = os.environ.get("MAX_JOBS")
    parallel = ["--parallel", jobs] if jobs else []
    run([cmake, "--build", str(directory), *parallel], "compiling", progress=True)

    library = directory / f"libdyhead_{name}.so"
    toolchain = (directory / "toolchain.txt").read_text()
    record: dict[str, Any] = dict(line.split("=", 1) for line in toolchain.splitlines())
    record = {key: value for key, value in record.items() if value}
    if "archs" in record:
        record["archs"] = record["archs"].split(";")
    linked = datetime.fromtimestamp(library.stat().st_mtime, tz=timezone.utc)
    return library, {"built": True, "time": linked.isoformat(timespec="seconds"), **record}


def replace_file(target: Path, content: bytes) -> None:
    """Writes through a rename: a process that has the old library mapped keeps it whole."""
    if target.exists() and target.read_bytes() == content:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.chmod(0o755 if target.suffix == ".so" else 0o644)
    temporary.replace(target)


def warn(name: str, problem: NotBuilt) -> None:
    lines = [f"dyhead_cuda: the {name} library was not built: {problem.reason}"]
    lines += [f"    {line}" for line in problem.log_tail[-20:]]
    print("\n".join(lines), file=sys.stderr, flush=True)


def kept_record(name: str, target: Path, sources: str) -> dict[str, Any] | None:
    """What is recorded of a CUDA library that DYHEAD_CUDA=local takes as it is; None to build it.

    It must be built from the sources as they are, and have code for the GPUs of this machine.
    """
    if name != "cuda" or os.environ.get("DYHEAD_CUDA") != "local":
        return None
    try:
        record = json.loads((target / "build.json").read_text())["cuda"]
    except (OSError, ValueError, KeyError):
        return None
    fits = record.get("sources") == sources and set(local_archs()) <= set(record["archs"])
    return record if fits and (target / f"libdyhead_{name}.so").is_file() else None


def build_libraries(target: Path) -> list[Path]:
    """Builds what can be built into ``target``; returns the files that lie there."""
    required = required_libraries()
    target.mkdir(parents=True, exist_ok=True)
    files = []
    record: dict[str, Any] = {"torch": None}
    digest = runpy.run_path(str(ROOT / "dyhead_cuda" / "sources.py"))["digest"]
    failed = set()
    for name in LIBRARIES:
        installed = target / f"libdyhead_{name}.so"
        try:
            torch = Torch.find()
            record["torch"] = {"version": torch.version, "cuda": torch.cuda}
            sources = digest(ROOT, name)  # before the build: what changes meanwhile is not in it
            kept = kept_record(name, target, sources)
            if kept is None:
                library, record[name] = build_library(name, torch)
                record[name]["sources"] = sources
                replace_file(installed, library.read_bytes())
            else:
                record[name] = kept
            files.append(installed)
        except NotBuilt as problem:
            installed.unlink(missing_ok=True)
            record[name] = {"built": False, "reason": problem.reason, "log_tail": problem.log_tail}
            failed.add(name)
            warn(name, problem)
    replace_file(target / "build.json", (json.dumps(record, indent=2) + "\n").encode())
    if failed & required:
        names = ", ".join(sorted(failed & required))
        raise SystemExit(f"dyhead_cuda: DYHEAD_REQUIRE asks for what could not be built: {names}")
    return [*files, target / "build.json"]


class BuildLibraries(build_ext):
    """build_ext that leaves the compiling to CMake."""

    def run(self) -> None:
        self.built = build_libraries(self.target())

    def target(self) -> Path:
        if INSTRUMENT:  # never among what is used
            return ROOT / "build" / "instrumented" / INSTRUMENT
        return (ROOT if self.inplace else Path(self.build_lib)) / "dyhead_cuda" / "lib"

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.built]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class LibraryWheel(bdist_wheel):
    """A wheel for every Python 3 on one platform: the libraries hold no Python."""

    def run(self) -> None:
        # setuptools never removes what an earlier build left there.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    # Makes the distribution one with native code; BuildLibraries never looks at the sources.
    ext_modules=[Extension("dyhead_cuda.lib", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": LibraryWheel},
)

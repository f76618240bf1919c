"""The source distribution and the wheels, and what can be told from their files alone.

A wheel has the library of the CPU, or that and the one of CUDA, and says which in its version:
``1.0.0+cpu``, ``1.0.0+cu13``. It serves every Python 3, and every torch from 2.10 on, for CUDA
those with the same major version of CUDA.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parent.parent
# What torch brings and has loaded: never packed again.
OF_TORCH = ("libtorch*.so", "libcudart.so.*")


class ReleaseError(RuntimeError):
    """Why something cannot be released."""


class NotBuilt(ReleaseError):
    """Why this machine cannot build a wheel."""


def label(kind: str) -> str:
    """The end of a wheel's version: "cpu", or "cu" and CUDA's major version."""
    if kind == "cpu":
        return "cpu"
    if torch.version.cuda is None:
        raise NotBuilt(f"torch {torch.__version__} is a build without CUDA")
    return f"cu{torch.version.cuda.split('.')[0]}"


def run(command: Sequence[object], **variables: str) -> str:
    """What a command of this Python's environment prints; ReleaseError if it fails."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PATH": programs, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        said = (result.stdout + result.stderr)[-3000:]
        raise ReleaseError(f"{' '.join(map(str, command))} failed:\n{said}")
    return result.stdout


def build_record(wheel: Path) -> dict[str, dict[str, object]]:
    """What the build wrote into the wheel about itself."""
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("dyhead_cuda/lib/build.json"))


def sources(target: Path) -> Path:
    """The source distribution, made in ``target``."""
    with TemporaryDirectory() as directory:
        run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", directory])
        (made,) = Path(directory).iterdir()
        return move(made, target)


def move(file: Path, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    (target / file.name).write_bytes(file.read_bytes())
    return target / file.name


def wheel(kind: str, target: Path) -> Path:
    """A wheel made in ``target``, with the tag of the oldest Linux that it runs on.

    Args:
        kind: "cpu" or "cuda".
        target: a directory.

    Raises:
        NotBuilt: it cannot be built here.
        ReleaseError: it is not for every torch from 2.10 on, or has traces of this machine.
    """
    with TemporaryDirectory() as directory:
        options = ["--quiet", "egg_info", f"--tag-build=+{label(kind)}"]
        variables = {"DYHEAD_REQUIRE": "cpu,cuda"}
        if kind == "cpu":
            variables = {"DYHEAD_REQUIRE": "cpu", "DYHEAD_CUDA": "off"}
        command = [sys.executable, "setup.py", *options, "bdist_wheel", "--dist-dir", directory]
        try:
            run(command, **variables)
        except ReleaseError as problem:
            raise NotBuilt(str(problem)) from None
        (plain,) = Path(directory).iterdir()
        if build_record(plain)["cpu"]["interface"] != "stable":
            raise ReleaseError(
                f"a wheel needs torch >= 2.10 to build with, got {torch.__version__}"
            )
        excluded = [option for name in OF_TORCH for option in ("--exclude", name)]
        tagged = Path(directory, "tagged")
        run([sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", tagged, plain])
        (made,) = tagged.iterdir()
        if found := traces(made, machine_paths()):
            raise ReleaseError(f"paths of this machine in {made.name}: {', '.join(found)}")
        return move(made, target)


def machine_paths() -> list[Path]:
    """Directories of this machine that no wheel may name."""
    return [ROOT, Path(sys.prefix), Path(torch.__file__).parent]


def traces(wheel: Path, paths: Sequence[Path]) -> list[str]:
    """The files of a wheel that name one of the paths."""
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    return [
        name
        for name, content in contents.items()
        if any(str(path).encode() in content for path in paths)
    ]


def machine_code(library: Path) -> int:
    """Bytes of a library's (compressed) code for GPUs."""
    sections = run(["readelf", "-SW", library])
    found = re.search(r"\.nv_fatbin\s+\S+\s+\S+\s+\S+\s+([0-9a-f]+)", sections)
    return int(found[1], 16) if found else 0


def describe(wheel: Path) -> str:
    """A wheel's name and sizes, as a line for people."""
    parts = [f"{wheel.stat().st_size / 2**20:.2f} MiB"]
    with TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                library = Path(archive.extract(name, directory))
                parts.append(f"{library.name} {library.stat().st_size / 2**20:.2f} MiB")
                if code := machine_code(library):
                    archs = ", ".join(map(str, build_record(wheel)["cuda"]["archs"]))  # type: ignore[call-overload]
                    parts.append(f"code for GPUs {code / 2**20:.2f} MiB ({archs})")
    return f"{wheel.name}: {'; '.join(parts)}"

"""Compiles kernels with nvcc and reads the machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .build import REPOSITORY


def find_disassembler() -> Path | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton, and so torch, brings along."""
    folders = []
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parent)
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    found = shutil.which("cuobjdump", path=path)
    return Path(found) if found else None


def compile_kernels(source: str, arch: str, folder: Path) -> Path:
    """The machine code of a file of csrc/cuda, compiled as the build does, warnings as errors."""
    cubin = folder / "kernels.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Wextra,-Werror", "-I", str(REPOSITORY / "csrc")]
    command += [f"-arch=sm_{arch}", "-cubin", str(REPOSITORY / "csrc/cuda" / source)]
    run = subprocess.run([*command, "-o", str(cubin)], text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    return cubin


def disassemble(cubin: Path) -> dict[str, str]:
    """The instructions of each kernel, by its mangled name."""
    tool = find_disassembler()
    if tool is None:
        pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")
    # cuobjdump looks for nvdisasm on PATH.
    path = os.pathsep.join([str(tool.parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [str(tool), "-sass", str(cubin)],
        env={**os.environ, "PATH": path},
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    functions = run.stdout.split("Function : ")[1:]
    return {name: code for name, _, code in (f.partition("\n") for f in functions)}


def instructions(code: str, name: str) -> set[str]:
    """The variants of an instruction that occur, as LDG.E.128 is one of LDG."""
    return set(re.findall(rf"\b{name}\b\S*", code))

"""What nvcc makes of the dynamic ReLU: wide accesses, nothing spilled."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .build import REPOSITORY

VECTOR_OF_TYPE = {"d": 2, "f": 4, "8bfloat16": 8, "7float16": 8}  # as names are mangled: 16 bytes


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
    cubin = folder / "kernels.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Wextra,-Werror", "-I", str(REPOSITORY / "csrc")]
    command += [f"-arch=sm_{arch}", "-cubin", str(REPOSITORY / "csrc/cuda" / source)]
    run = subprocess.run([*command, "-o", str(cubin)], text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    return cubin


def disassemble(cubin: Path) -> dict[tuple[str, int], str]:
    """The instructions of each kernel, by storage type (mangled) and vector length."""
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
    kernels = {}
    for function in run.stdout.split("Function : ")[1:]:
        name, _, code = function.partition("\n")
        match = re.search(r"kernelI(?:NS_)?(\w+?)(?:E)?Li(\d+)EEEv", name)
        assert match, name
        kernels[match[1], int(match[2])] = code
    return kernels


@pytest.mark.spawns
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", ["dynamic_relu_fwd.cu", "dynamic_relu_bwd.cu"])
def test_accesses(source: str, arch: str, tmp_path: Path) -> None:
    kernels = disassemble(compile_kernels(source, arch, tmp_path))
    assert set(kernels) == {(t, v) for t, most in VECTOR_OF_TYPE.items() for v in (1, most)}
    for (storage, vector), code in kernels.items():
        assert "EXIT" in code
        spilled = re.findall(r"\b(?:LDL|STL)\b\S*", code)
        assert not spilled, f"{storage}, {vector}: {len(spilled)} accesses of local memory"
        loads = set(re.findall(r"\bLDG\.\S+", code))
        stores = set(re.findall(r"\bSTG\.\S+", code))
        if vector == 1:
            continue
        assert any(".128" in load for load in loads), f"{storage}: {loads}"
        assert any(".128" in store for store in stores), f"{storage}: {stores}"
        # Coefficients are written in the same launch: the read-only path might show old values.
        narrow = {load for load in loads if "CONSTANT" in load and ".128" not in load}
        assert not narrow, f"{storage}: {narrow}"

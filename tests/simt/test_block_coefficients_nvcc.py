"""What nvcc makes of block_coefficients: nothing in local memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .test_dynamic_relu_nvcc import compile_kernels, find_disassembler


@pytest.mark.spawns
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(
    ("source", "kernels"), [("block_coefficients_fwd.cu", 2), ("block_coefficients_bwd.cu", 4)]
)
def test_no_local_memory(source: str, kernels: int, arch: str, tmp_path: Path) -> None:
    tool = find_disassembler()
    if tool is None:
        pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")
    cubin = compile_kernels(source, arch, tmp_path)
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
    assert len(functions) == kernels
    for code in functions:
        assert "EXIT" in code
        name = code.split("\n", 1)[0]
        accesses = re.findall(r"\b(?:LDL|STL)\b\S*", code)
        assert not accesses, f"{name}: {len(accesses)} accesses of local memory"

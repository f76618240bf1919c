"""What nvcc makes of the operators' kernels: wide accesses, nothing spilled."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from .nvcc import compile_kernels, disassemble, instructions

# Kernels kernel<T, V> on vectors of V values of T: their names without _kernel, by source.
VECTOR_KERNELS = {
    "dynamic_relu_fwd.cu": ["dynamic_relu_fwd"],
    "dynamic_relu_bwd.cu": ["dynamic_relu_bwd"],
    "fuse_branches_fwd.cu": ["fuse_branches_fwd"],
    "fuse_branches_bwd.cu": ["fuse_branches_bwd_pixels", "fuse_branches_bwd_merge"],
}
# In these no value that the launch itself writes may be read through the read-only path, which
# might show an old one: only the wide loads of rows take it.
WRITTEN_IN_THE_LAUNCH = {"dynamic_relu_fwd", "dynamic_relu_bwd"}

VECTOR_OF_TYPE = {"d": 2, "f": 4, "8bfloat16": 8, "7float16": 8}  # as names are mangled: 16 bytes


def parse_name(mangled: str, kernels: list[str]) -> tuple[str, str, int]:
    """Kernel, storage type (mangled) and vector length."""
    names = "|".join(kernels)
    match = re.search(rf"\d({names})_kernelI(?:NS_)?(\w+?)(?:E)?Li(\d+)EEEv", mangled)
    assert match, mangled
    return match[1], match[2], int(match[3])


@pytest.mark.spawns
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("source", VECTOR_KERNELS)
def test_accesses(source: str, arch: str, tmp_path: Path) -> None:
    compiled = disassemble(compile_kernels(source, arch, tmp_path))
    kernels = {parse_name(name, VECTOR_KERNELS[source]): code for name, code in compiled.items()}
    assert set(kernels) == {
        (kernel, storage, vector)
        for kernel in VECTOR_KERNELS[source]
        for storage, most in VECTOR_OF_TYPE.items()
        for vector in (1, most)
    }
    for (kernel, storage, vector), code in kernels.items():
        what = f"{kernel}, {storage}, {vector}"
        assert "EXIT" in code
        spilled = instructions(code, "LDL") | instructions(code, "STL")
        assert not spilled, f"{what}: accesses of local memory {spilled}"
        if vector == 1:
            continue
        loads, stores = instructions(code, "LDG"), instructions(code, "STG")
        assert any(".128" in load for load in loads), f"{what}: {loads}"
        assert any(".128" in store for store in stores), f"{what}: {stores}"
        if kernel in WRITTEN_IN_THE_LAUNCH:
            narrow = {load for load in loads if "CONSTANT" in load and ".128" not in load}
            assert not narrow, f"{what}: {narrow}"

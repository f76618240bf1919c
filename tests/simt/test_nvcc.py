"""The test kernels, and with them all of primitives.cuh, also compile for devices."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

from .build import SOURCE

KERNELS = sorted((SOURCE / "kernels").glob("*.cu"))


@pytest.mark.spawns
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_compiles_for_devices(kernel: Path, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++20", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Wextra,-Werror", "-I", str(ROOT / "csrc")]
    for arch in ("80", "90a"):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-c", str(kernel), "-o", str(tmp_path / "kernel.o")]
    run = subprocess.run(command, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr

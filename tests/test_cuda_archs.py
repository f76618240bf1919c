"""Which architectures a build is for: the defaults, the machine's, and those asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

NVCC_12_6 = "75 80 86 87 89 90"
NVCC_13_0 = f"{NVCC_12_6} 100 103 110 120 121"


def program(folder: Path, name: str, script: str) -> Path:
    """A shell script that stands for a program which this machine may lack."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(folder: Path, known: str) -> Path:
    lines = "".join(f"echo compute_{number}\n" for number in known.split())
    return program(folder, "nvcc", lines)


def said_by_cmake(folder: Path, script: str) -> str:
    """What a script prints that has read cmake/cuda_archs.cmake."""
    file = folder / "try.cmake"
    file.write_text(f"include({ROOT}/cmake/cuda_archs.cmake)\n{script}\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    assert cmake is not None
    result = subprocess.run([cmake, "-P", file], text=True, capture_output=True, check=False)
    return " ".join(result.stderr.split())


def configured(folder: Path, nvcc: Path, requested: str = "", local: str = "") -> str:
    """The architectures, or what is wrong with them."""
    call = f'dyhead_cuda_archs(archs "{nvcc}" "{requested}" "{local}")'
    return said_by_cmake(folder, call + '\nmessage("archs=${archs}")')


@pytest.mark.parametrize(
    ("known", "requested", "local", "expected"),
    [
        (NVCC_13_0, "", "", "80;86;89;90a;100;120"),
        (NVCC_12_6, "", "", "80;86;89;90a"),
        (NVCC_13_0, "", "90a", "80;86;89;90a;100;120"),
        (NVCC_13_0, "", "87;110", "80;86;87;89;90a;100;110;120"),
        (NVCC_12_6, "", "110", "80;86;89;90a"),
        (NVCC_13_0, "90a;80", "87", "90a;80"),  # PTX is for the last one that was asked for
        (NVCC_13_0, "100f", "", "100f"),
    ],
)
def test_archs(tmp_path: Path, known: str, requested: str, local: str, expected: str) -> None:
    nvcc = fake_nvcc(tmp_path, known)
    assert configured(tmp_path, nvcc, requested, local) == f"archs={expected}"


@pytest.mark.parametrize(
    ("known", "requested", "complaint"),
    [
        (NVCC_12_6, "80;120", "does not know '120', only 75, 80, 86, 87, 89, 90: leave it out"),
        (NVCC_13_0, "sm_80", "expected entries such as 80, 90a or 100f, got 'sm_80'"),
        ("35", "", "knows none of '80;86;89;90a;100;120': set CUDACXX to a newer nvcc"),
        ("", "", "--list-gpu-arch: expected a list of architectures"),
    ],
)
def test_what_cannot_be_built(tmp_path: Path, known: str, requested: str, complaint: str) -> None:
    assert complaint in configured(tmp_path, fake_nvcc(tmp_path, known), requested)


@pytest.mark.parametrize(
    ("version", "option"),
    [("12.9.1", "-Xfatbin=-compress-all"), ("13.0.88", "--compress-mode=size")],
)
def test_compression(tmp_path: Path, version: str, option: str) -> None:
    call = f'dyhead_compression(option "{version}")'
    assert said_by_cmake(tmp_path, call + '\nmessage("${option}")') == option


def arguments_of_setup(folder: Path, **variables: str) -> list[str]:
    """What setup.py hands to CMake for the CUDA library, with the programs of ``folder``."""
    code = """
import json, runpy, sys
from pathlib import Path
sys.argv = ["setup.py", "--quiet", "--name"]
setup = runpy.run_path("setup.py")
torch = setup["Torch"](Path("torch"), "2.11.0+cu130", "13.0")
print(json.dumps(setup["configure_arguments"]("cuda", torch)))
"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DYHEAD_", "CUDA"))}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, "PATH": path, **variables},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("script", "local"),
    [
        ("echo 9.0; echo 8.7; echo 9.0", "87;90a"),
        ("echo 7.5", ""),  # too old for the kernels
        ("echo '[N/A]'", ""),
        ("echo no driver; exit 9", ""),
    ],
)
def test_the_gpus_at_hand_are_in_the_build(tmp_path: Path, script: str, local: str) -> None:
    program(tmp_path, "nvidia-smi", script)
    program(tmp_path, "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    arguments = arguments_of_setup(tmp_path)
    assert f"-DDYHEAD_CUDA_LOCAL_ARCHS={local}" in arguments
    arguments = arguments_of_setup(tmp_path, DYHEAD_CUDA_ARCHS="80")
    assert "-DDYHEAD_CUDA_ARCHS=80" in arguments
    assert not named(arguments, "DYHEAD_CUDA_LOCAL_ARCHS")


def test_a_build_for_the_gpus_at_hand_alone(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", "echo 9.0; echo 8.7")
    program(tmp_path, "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    arguments = arguments_of_setup(tmp_path, DYHEAD_CUDA="local")
    assert "-DDYHEAD_CUDA_ARCHS=87;90a" in arguments
    assert not named(arguments, "DYHEAD_CUDA_LOCAL_ARCHS")


def named(arguments: Sequence[str], name: str) -> list[str]:
    return [value for value in arguments if value.startswith(f"-D{name}=")]


def test_warnings_are_errors_and_lines_are_kept_where_asked_for(tmp_path: Path) -> None:
    program(tmp_path, "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    for variables, value in (
        ({}, "off"),
        ({"DYHEAD_WERROR": "on", "DYHEAD_LINEINFO": "on"}, "on"),
    ):
        arguments = arguments_of_setup(tmp_path, **variables)
        for name in ("DYHEAD_WERROR", "DYHEAD_LINEINFO"):
            assert named(arguments, name) == [f"-D{name}={value}"]

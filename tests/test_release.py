"""make wheel and make wheel-check: what they make, and what they refuse."""

from __future__ import annotations

import fcntl
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch

from dyhead_cuda import library
from dyhead_cuda.version import __version__
from release import trial, wheels
from tests.helpers.paths import ROOT


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with a library that was built in /build/here."""
    file = tmp_path / "dyhead_cuda-1.0.0+cpu-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dyhead_cuda/__init__.py", "")
        archive.writestr("dyhead_cuda/lib/libdyhead_cpu.so", b"\x7fELF\0/build/here/csrc/a.cpp\0")
        archive.writestr("dyhead_cuda/lib/build.json", json.dumps({"cpu": {"interface": "stable"}}))
    return file


def test_a_path_of_the_machine_is_found_in_a_compressed_file(wheel: Path) -> None:
    assert wheels.traces(wheel, [Path("/build/here")]) == ["dyhead_cuda/lib/libdyhead_cpu.so"]
    assert wheels.traces(wheel, [Path("/build/there")]) == []
    assert ROOT in wheels.machine_paths()
    assert wheels.build_record(wheel)["cpu"]["interface"] == "stable"


def test_a_version_says_which_libraries_a_wheel_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert (wheels.label("cpu"), wheels.label("cuda")) == ("cpu", "cu13")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(wheels.ReleaseError, match="a build without CUDA"):
        wheels.label("cuda")


def test_a_command_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(wheels.ReleaseError, match=r"(?s)sh -c .* failed:\nwhy"):
        wheels.run(["sh", "-c", "echo why; exit 3"])


@pytest.mark.parametrize(
    ("name", "cuda", "reasons", "error", "told"),
    [
        ("x-1.0.0+cpu-py3", "None", {"cpu": "", "cuda": "no"}, 1e-6, "cpu loaded"),
        ("x-1.0.0+cpu-py3", "13.0", {"cpu": "", "cuda": "no"}, 1e-6, "cpu loaded"),
        ("x-1.0.0+cu13-py3", "13.2", {"cpu": "", "cuda": ""}, 1e-6, "cpu and cuda loaded"),
        ("x-1.0.0+cu13-py3", "12.8", {"cpu": "", "cuda": "no"}, 1e-6, "cpu loaded"),
        ("x-1.0.0+cu13-py3", "13.0", {"cpu": "", "cuda": "broken"}, 1e-6, "cuda: broken"),
        ("x-1.0.0+cpu-py3", "None", {"cpu": "broken", "cuda": ""}, 1e-6, "cpu: broken"),
        ("x-1.0.0+cpu-py3", "None", {"cpu": "", "cuda": ""}, 1e-3, "error 0.001"),
        ("x-1.0.0+cpu-py3", "None", {"cpu": "", "cuda": ""}, float("nan"), "error nan"),
    ],
)
def test_what_a_trial_makes_of_what_it_finds(
    name: str, cuda: str, reasons: dict[str, str], error: float, told: str
) -> None:
    found = {"torch": "2.10.0", "loaded": reasons, "error": error}
    try:
        said = trial.judge(name, found, cuda)
    except wheels.ReleaseError as problem:
        said = str(problem)
    assert told in said


@pytest.mark.skipif(not library.loaded("cpu"), reason="the CPU library was not built")
def test_the_wheel_of_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("auditwheel")
    with (ROOT / "build" / "packing.lock").open("w") as lock:  # it writes into the working tree
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = wheels.wheel("cpu", tmp_path)
    pattern = rf"dyhead_cuda-{re.escape(__version__)}\+cpu-py3-none-manylinux_\d+_\d+_\w+\.whl"
    assert re.fullmatch(pattern, made.name)
    assert list(tmp_path.iterdir()) == [made]
    with zipfile.ZipFile(made) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert libraries == ["dyhead_cuda/lib/libdyhead_cpu.so"]
    assert re.search(r"MiB; libdyhead_cpu\.so \d\.\d\d MiB$", wheels.describe(made))

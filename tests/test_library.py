"""The loader: every reason for which a library is not there is told, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dyhead_cuda import library


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without a source tree or a build."""
    monkeypatch.setattr(library, "DIRECTORY", tmp_path)
    monkeypatch.setattr(library, "_ROOT", tmp_path / "no")
    return tmp_path


def reason(name: str, record: dict[str, Any]) -> str:
    state = library._load(name, record)
    assert not state.loaded
    assert state.fix
    return state.reason


def test_a_missing_file(empty: Path) -> None:
    assert reason("cpu", {}) == f"{empty / 'libdyhead_cpu.so'} does not exist"


def test_sources_that_hide_an_installed_package_are_named(empty: Path) -> None:
    """After pip install in a checkout, Python still imports the checkout while it stands there."""
    assert "in the source tree" in library._load("cpu", {}).fix
    (empty / "no" / "csrc").mkdir(parents=True)
    assert "start Python in another folder" in library._load("cpu", {}).fix


def test_what_was_not_built_says_why(empty: Path) -> None:
    record = {"cpu": {"built": False, "reason": "no compiler", "log_tail": []}}
    assert reason("cpu", record) == "it was not built: no compiler"


def test_a_file_that_does_not_load(empty: Path) -> None:
    (empty / "libdyhead_cpu.so").write_bytes(b"not an ELF file")
    told = reason("cpu", {})
    assert told.startswith(f"it does not load under torch {torch.__version__}: ")
    assert "libdyhead_cpu.so" in told  # the loader's own words
    assert "Could not load this library" not in told


def test_an_older_torch(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.3.1+cpu")
    assert reason("cpu", {}) == "it needs torch >= 2.4, found 2.3.1+cpu"
    monkeypatch.setattr(torch, "__version__", "3.0.0a0+git1234")
    assert "does not exist" in reason("cpu", {})


@pytest.mark.parametrize(
    ("interface", "needed", "found", "told"),
    [
        (
            "stable",
            "2.10",
            "2.9.1+cu128",
            "it was built for torch 2.10 or newer, found 2.9.1+cu128",
        ),
        ("stable", "2.10", "2.10.0", "it does not load"),
        ("stable", "2.10", "3.0.0a0", "it does not load"),
        ("classic", "2.9", "2.10.0", "it was built for torch 2.9 alone, found 2.10.0"),
        ("classic", "2.9", "2.8.0", "it was built for torch 2.9 alone, found 2.8.0"),
        ("classic", "2.9", "2.9.1+cpu", "it does not load"),
    ],
)
def test_a_library_that_was_built_for_another_torch(
    empty: Path, monkeypatch: pytest.MonkeyPatch, interface: str, needed: str, found: str, told: str
) -> None:
    monkeypatch.setattr(torch, "__version__", found)
    (empty / "libdyhead_cpu.so").write_bytes(b"never opened where it is told before")
    record = {"cpu": {"built": True, "interface": interface, "torch": needed}}
    assert reason("cpu", record).startswith(told)


def test_a_torch_without_cuda(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA" in reason("cuda", {})


def test_another_major_version_of_cuda(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (empty / "libdyhead_cuda.so").write_bytes(b"never opened")
    record = {"torch": {"version": "2.11.0+cu128", "cuda": "12.8"}}
    assert reason("cuda", record).startswith("it was built for CUDA 12.8, but torch")
    record["torch"]["cuda"] = "13.2"
    assert reason("cuda", record).startswith("it does not load")


def test_a_broken_build_record_is_as_none(tmp_path: Path) -> None:
    assert library.read_build_record(tmp_path) == {}
    for text in ("{", "[]", "\x00"):
        (tmp_path / "build.json").write_text(text)
        assert library.read_build_record(tmp_path) == {}
    (tmp_path / "build.json").write_text(json.dumps({"cpu": {"built": True}}))
    assert library.read_build_record(tmp_path) == {"cpu": {"built": True}}


def test_without_the_cpu_library_there_is_one_warning_and_no_cuda_library(
    empty: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = library._load_all()
    assert not states["cpu"].loaded
    assert not states["cuda"].loaded
    assert "CPU library" in states["cuda"].reason
    (warning,) = caplog.records
    assert warning.name == "dyhead_cuda"
    assert "does not exist" in warning.getMessage()
    monkeypatch.setattr(library, "_STATES", states)
    with pytest.raises(RuntimeError, match=r"cpu library is not available: .*To fix it: run"):
        library.require("cpu")
    assert library.fix("cpu")


def test_the_state_of_both_libraries_is_consistent() -> None:
    for name in library.NAMES:
        assert library.loaded(name) == (library.reason(name) == "") == (library.fix(name) == "")
    if library.loaded("cpu"):
        library.require("cpu")


@pytest.mark.parametrize("call", [library.loaded, library.reason, library.fix, library.require])
def test_unknown_names_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a library out of .*, got 'gpu'"):
        call("gpu")

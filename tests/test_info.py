"""``python -m dyhead_cuda info`` and the command line around it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from dyhead_cuda import info, library
from dyhead_cuda.__main__ import main
from dyhead_cuda.version import __version__


def test_info_tells_the_facts_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["dyhead_cuda"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["capability"] in torch.backends.cpu.get_cpu_capability().lower()
    for name in library.NAMES:
        state = facts["libraries"][name]
        assert state["loaded"] == library.loaded(name)
        assert state["loaded"] or (state["reason"], state["fix"]) == (
            library.reason(name),
            library.fix(name),
        )
    if library.loaded("cpu"):
        assert "cpu" in facts["operators"]["dynamic_relu_fwd"]
        assert ("cuda" in facts["operators"]["dynamic_relu_fwd"]) == library.loaded("cuda")


def test_info_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for operator in info.gather()["operators"]:
        assert operator in text
    for name in library.NAMES:
        assert f"{name} library" in text
        assert library.reason(name) in text


def test_info_shows_what_failed_and_which_gpus_are_covered() -> None:
    facts = info.gather()
    facts["libraries"]["cuda"] = {
        "loaded": False,
        "reason": "it was not built: compiling failed",
        "fix": "install nvcc",
        "log_tail": ["error: planted"],
    }
    gpu = {"name": "GPU X", "capability": "7.5", "memory_gib": 15.0, "code": None}
    facts["gpus"] = [gpu, {**gpu, "capability": "9.0", "code": "sm_90a"}]
    facts["operators"] = {}
    text = info.format_text(facts)
    for part in (
        "compiling failed",
        "install nvcc",
        "error: planted",
        "not in DYHEAD_CUDA_ARCHS",
        "runs sm_90a",
        "everything runs on the reference",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), None),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "PTX of compute_120"),
    ],
)
def test_covering_code(capability: tuple[int, int], expected: str | None) -> None:
    assert info.covering_code(["80", "86", "89", "90a", "100", "120"], capability) == expected


def test_code_for_a_specific_target_covers_nothing_else() -> None:
    assert info.covering_code(["80", "90a"], (10, 0)) is None
    assert info.covering_code(["90", "90a"], (9, 0)) == "sm_90a"
    assert info.covering_code([], (8, 0)) is None


def test_a_command_imports_only_what_it_needs() -> None:
    script = (
        "import sys; from dyhead_cuda.__main__ import main; main(['info']); "
        "print(sorted({'dyhead_cuda.commands.demo', 'matplotlib', 'torchvision', 'skimage'} "
        "& set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_rich(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named 'rich' ({name})", name="rich")

    monkeypatch.setattr(importlib, "import_module", without_rich)
    with pytest.raises(SystemExit) as stopped:
        main(["demo"])
    assert stopped.value.code == 2
    assert "demo needs rich: run pip install 'dyhead_cuda[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["info", "--no-such-option"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m dyhead_cuda" in capsys.readouterr().err

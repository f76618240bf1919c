"""``python -m dyhead_cuda info``: what it prints."""

from __future__ import annotations

import json

import pytest
import torch

from dyhead_cuda import info, library
from dyhead_cuda.__main__ import main
from dyhead_cuda.commands.info import format_text
from dyhead_cuda.version import __version__


def test_info_tells_the_facts_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["dyhead_cuda"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["capability"] == library.cpu_capability()
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
    gpu = {"name": "GPU X", "capability": "7.5", "memory_gib": 15.0}
    facts["gpus"] = [
        {**gpu, "code": None, "problem": "the kernels need 8.0"},
        {**gpu, "capability": "9.0", "code": "sm_90a", "problem": ""},
    ]
    facts["operators"] = {}
    text = format_text(facts)
    for part in (
        "compiling failed",
        "install nvcc",
        "error: planted",
        "the kernels need 8.0",
        "runs sm_90a",
        "everything runs on the reference",
    ):
        assert part in text

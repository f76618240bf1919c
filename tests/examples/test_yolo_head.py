"""The detection layer of examples/yolo_head.py takes and returns lists, and trains."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch

from tests.helpers.paths import ROOT


def test_the_yolo_head_takes_and_returns_lists(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "yolo_head.py"))
    head = namespace["DetectDyHead"](classes=2, widths=(8, 12, 16), channels=16, blocks=1, bins=4)
    sizes = ((12, 9), (6, 5), (3, 3))
    features = [torch.randn(1, c, *s) for c, s in zip((8, 12, 16), sizes, strict=True)]
    outs = head(features)
    assert isinstance(outs, list)
    assert [list(out.shape) for out in outs] == [[1, 18, *size] for size in sizes]
    namespace["main"]()
    printed = capsys.readouterr().out
    assert "[2, 67, 32, 40]" in printed
    parameters = sum(1 for _ in namespace["DetectDyHead"](classes=3).parameters())
    assert f"parameters with a gradient: {parameters}" in printed

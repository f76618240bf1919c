"""``python -m benchmarks runtimes``: the head in other runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme
from benchmarks.__main__ import main
from benchmarks.cases.shapes import SHAPE_SETS, ShapeSet, pyramid_of
from benchmarks.measuring import runtimes
from tests.helpers.paths import ROOT

RESULTS = Path("benchmarks") / "results" / "runtimes" / "cpu.json"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    shapes = ShapeSet("tiny", "nowhere", pyramid_of(12, 16, 3), 1, channels=16, num_groups=4)
    monkeypatch.setitem(SHAPE_SETS, "tiny", shapes)
    # Compiling takes longer than all that is tested here.
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    return "tiny"


def test_every_runtime_gives_the_numbers_and_a_time(tiny: str) -> None:
    found = runtimes.measure(tiny, 1, 2)
    rows = found["rows"]
    assert list(rows) == ["dyhead_cuda", "torch.compile", "torch.export", "onnxruntime", "OpenVINO"]
    for name, row in rows.items():
        if name == "OpenVINO" and "remark" in row:
            assert row == {"remark": "not installed"}
            continue
        assert row["seconds"] > 0
        assert row["error"] <= runtimes.TOLERANCE


def test_wrong_numbers_are_no_result(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(head: Any, levels: list[torch.Tensor], folder: Path) -> Any:
        return lambda: [1.001 * x for x in head(levels)]

    monkeypatch.setattr(runtimes, "_onnxruntime", wrong)
    with pytest.raises(RuntimeError, match="expected the numbers of this package"):
        runtimes.measure(tiny, 1, 1)


def test_the_docs_show_the_committed_results(tmp_path: Path) -> None:
    data = json.loads((ROOT / RESULTS).read_text())
    text = (ROOT / "docs" / "performance.md").read_text()
    new = runtimes.section(data, f"../{RESULTS.as_posix()}")
    assert readme.replace_section(text, readme.RUNTIMES, new) == text, (
        f"run python -m benchmarks runtimes --report --json {RESULTS} --write docs/performance.md"
    )


def test_the_table_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / RESULTS)
    assert main(["runtimes", "--report", "--json", path]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    target = tmp_path / "page.md"
    target.write_text("\n".join(readme.markers(readme.RUNTIMES)))
    assert main(["runtimes", "--report", "--json", path, "--write", str(target)]) == 0
    assert "| head | dyhead_cuda |" in target.read_text()

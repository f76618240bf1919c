"""``python -m benchmarks runtimes``: the head in other runtimes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme
from benchmarks.__main__ import main
from benchmarks.cases.shapes import SHAPE_SETS, ShapeSet, pyramid_of
from benchmarks.measuring import runtimes
from tests.helpers.paths import ROOT

RESULTS = [
    path.relative_to(ROOT) for path in sorted((ROOT / "benchmarks/results/runtimes").glob("*.json"))
]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    shapes = ShapeSet("tiny", "nowhere", pyramid_of(12, 16, 3), 1, channels=16, num_groups=4)
    monkeypatch.setitem(SHAPE_SETS, "tiny", shapes)
    # Compiling takes longer than all that is tested here.
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    return "tiny"


NAMES = ["dyhead_cuda", "torch.compile", "torch.export", "onnxruntime", "OpenVINO"]


CASES = {
    "deform_conv": runtimes.operator_case,
    "head": lambda shapes: runtimes.head_case(shapes, 1),
    "detector": lambda _: runtimes.detector_case(),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name in CASES for precision in runtimes.PRECISIONS][:-1],
)
def test_every_runtime_gives_the_numbers_and_a_time(name: str, precision: str, tiny: str) -> None:
    case = CASES[name](tiny)
    found = runtimes.measure(case, precision, 2)
    assert found["flops"] == case.flops > 0
    assert list(found["rows"]) == NAMES
    for runtime, row in found["rows"].items():
        if "remark" in row:
            assert row["remark"] == {
                "onnxruntime": "float32 only" if precision == "bfloat16" else None,
                "OpenVINO": "reads no DeformConv"
                if case.layers is None and find_spec("openvino")
                else "not installed",
            }.get(runtime)
            continue
        assert row["seconds"] > 0
        assert row["error"] <= runtimes.TOLERANCE[precision]


def test_wrong_numbers_are_no_result(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Any, folder: Path) -> Any:
        return lambda: [1.001 * x for x in case.module(*case.inputs)]

    monkeypatch.setattr(runtimes, "_onnxruntime", wrong)
    with pytest.raises(RuntimeError, match="expected the numbers of this package"):
        runtimes.measure(runtimes.head_case(tiny, 1), "float32", 1)


def test_the_best_other_runtime_is_named() -> None:
    def rows(onnxruntime: float, openvino: float) -> dict[str, Any]:
        return {"onnxruntime": {"seconds": onnxruntime}, "OpenVINO": {"seconds": openvino}}

    assert runtimes._best_other(rows(1.3, 1.15), 1.0) == "OpenVINO, 1.15 x"
    assert runtimes._best_other(rows(0.8, 1.15), 1.0) == "onnxruntime, 0.80 x"
    missing = {"onnxruntime": {"remark": "float32 only"}, "OpenVINO": {"remark": "not installed"}}
    assert runtimes._best_other(missing, 1.0) == "-"


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_the_docs_show_the_committed_results(results: Path) -> None:
    data = json.loads((ROOT / results).read_text())
    text = (ROOT / "docs" / "performance.md").read_text()
    new = runtimes.section(data, f"../{results.as_posix()}")
    assert readme.replace_section(text, readme.section_of(readme.RUNTIMES, results), new) == text, (
        f"run python -m benchmarks runtimes --report --json {results} --write docs/performance.md"
    )


def test_the_table_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / RESULTS[0])
    assert main(["runtimes", "--report", "--json", path]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    target = tmp_path / "page.md"
    target.write_text("\n".join(readme.markers(readme.section_of(readme.RUNTIMES, RESULTS[0]))))
    assert main(["runtimes", "--report", "--json", path, "--write", str(target)]) == 0
    assert "| case | precision | dyhead_cuda |" in target.read_text()

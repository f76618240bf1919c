"""The benchmarks run, check their results and describe themselves; times are never judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import dynamic_relu, timing

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def test_quick_run_writes_a_complete_record(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    argv = ["--quick", "--device", "cpu", "--dtype", "float32", "bfloat16", "--json", str(target)]
    assert dynamic_relu.main(argv) == 0
    record = json.loads(target.read_text())
    assert record["benchmark"] == "dynamic_relu"
    assert record["device"] == "cpu"
    assert record["torch"] == torch.__version__
    assert record["command"].startswith("python -m benchmarks.dynamic_relu --quick")
    assert {"date", "commit", "processor", "threads", "library_loaded"} <= record.keys()
    assert list(record["skipped"]) == [dynamic_relu.COMPILED]
    implementations = ["dyhead_cuda", "dyhead_cuda, NCHW", "layer by layer", "reference"]
    found = {
        (r["dtype"], r["direction"], r["case"], r["implementation"]) for r in record["results"]
    }
    assert found == {
        (dtype, direction, case.name, implementation)
        for dtype in ("float32", "bfloat16")
        for direction in ("forward", "forward+backward")
        for case in dynamic_relu.QUICK_CASES
        for implementation in implementations
    }
    for row in record["results"]:
        assert 0 < row["lower_quartile_s"] <= row["median_s"] <= row["upper_quartile_s"]
        assert row["runs"] == timing.QUICK.most_runs
        size = {"float32": 4, "bfloat16": 2}[row["dtype"]]
        transfers = {"forward": 2, "forward+backward": 5}[row["direction"]]
        assert row["bytes"] == transfers * size * math.prod(row["shape"])
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        if row["implementation"] == "dyhead_cuda":
            assert row["times_ours"] == 1
            assert row["error"] <= 2 * timing.TOLERANCES[row["dtype"]]


def test_json_on_stdout_is_nothing_but_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.dynamic_relu", "--quick", "--device", "cpu", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]
    assert "Dynamic ReLU, forward, float32" in done.stderr


def test_the_real_shapes_are_those_of_an_800_by_1344_pyramid() -> None:
    shapes = [case.shape for case in dynamic_relu.CASES]
    sizes = [(100, 168)]
    while len(sizes) < 5:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    assert shapes == [(n, 256, *size) for n in (1, 2) for size in sizes] + [(1000, 256, 7, 7)]


def _plus_a_little(*arguments: Tensor) -> Tensor:
    return dynamic_relu.layer_by_layer(*arguments) * 1.001


def _with_a_wrong_gradient(x: Tensor, *parameters: Tensor) -> Tensor:
    return dynamic_relu.layer_by_layer(x, *parameters) + 0.1 * (x - x.detach())


@pytest.mark.parametrize(
    ("wrong", "direction"),
    [(_plus_a_little, dynamic_relu.FORWARD), (_with_a_wrong_gradient, dynamic_relu.BOTH)],
)
def test_a_wrong_result_or_gradient_is_never_timed(
    wrong: Callable[..., Tensor], direction: str
) -> None:
    problem = dynamic_relu.Problem.random(dynamic_relu.QUICK_CASES[0], "float32", CPU)
    good = dynamic_relu.Implementation("good", dynamic_relu.layer_by_layer, torch.contiguous_format)
    problem.check(good, problem.action(good, direction)())
    bad = dynamic_relu.Implementation("bad", wrong, torch.contiguous_format)
    with pytest.raises(dynamic_relu.WrongResultError, match="bad, small level, float32"):
        problem.check(bad, problem.action(bad, direction)())


def test_not_a_number_is_wrong() -> None:
    problem = dynamic_relu.Problem.random(dynamic_relu.QUICK_CASES[0], "float32", CPU)
    how = dynamic_relu.Implementation("nan", dynamic_relu.layer_by_layer, torch.channels_last)
    with pytest.raises(dynamic_relu.WrongResultError, match="got nan"):
        problem.check(how, [torch.full_like(problem.x, math.nan)])


def test_a_wrong_result_ends_the_benchmark_with_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dynamic_relu, "layer_by_layer", _plus_a_little_of_itself())
    target = tmp_path / "result.json"
    assert dynamic_relu.main(["--quick", "--device", "cpu", "--json", str(target)]) == 1
    assert not target.exists()


def _plus_a_little_of_itself() -> Callable[..., Tensor]:
    original = dynamic_relu.layer_by_layer

    def wrong(*arguments: Tensor) -> Tensor:
        return original(*arguments) + 1e-3

    return wrong


def test_timing_counts_the_runs_and_orders_the_quartiles() -> None:
    calls = []
    effort = timing.Effort(warmup_runs=2, least_runs=5, most_runs=5, seconds=60)
    result = timing.measure(lambda: calls.append(0), CPU, effort)
    assert result.runs == 5
    assert len(calls) == 7
    assert timing.Timing.of([1.0, 5.0, 2.0, 4.0, 3.0]) == timing.Timing(3, 2, 4, 5)


def test_inputs_are_random_and_repeatable() -> None:
    first, second = (
        dynamic_relu.Problem.random(dynamic_relu.QUICK_CASES[1], "float32", CPU) for _ in range(2)
    )
    assert torch.equal(first.x, second.x)
    assert first.x.std() > 0.5
    assert all(p.unique().numel() == p.numel() for p in first.parameters)
    assert not torch.equal(first.x, first.grad_out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about a missing GPU")
def test_cuda_without_a_gpu_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        dynamic_relu.main(["--quick", "--device", "cuda"])
    assert ended.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_json_file_that_cannot_be_written_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        dynamic_relu.main(["--quick", "--json", str(tmp_path / "missing" / "result.json")])
    assert ended.value.code == 2
    assert "existing directory" in capsys.readouterr().err


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    assert dynamic_relu.main(["--quick", "--device", "cuda", "--json", str(target)]) == 0
    record = json.loads(target.read_text())
    assert record["device"] == "cuda"
    assert {row["dtype"] for row in record["results"]} == {"float32", "bfloat16"}
    assert all(row["median_s"] > 0 for row in record["results"])

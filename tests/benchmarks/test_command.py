"""The benchmarks run, check before they time, and describe themselves; times are never judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.__main__ import main
from benchmarks.cases import heads, peers
from benchmarks.cases.problems import BOTH, DIRECTIONS, FORWARD, OURS, Problem, Setting
from benchmarks.cases.shapes import SHAPE_SETS
from benchmarks.measuring import fma, probes, runner, timing
from benchmarks.measuring.timing import COLD, GRAPH, QUICK, WARM, Effort, Timing
from benchmarks.reports import results
from benchmarks.reports.results import Row
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
MICRO = runner.Options(CPU, QUICK, (WARM,))
QUICK_RUN = ["--quick", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # what is tiny is slower on more


def _quietly(_: str) -> None:
    pass


def test_a_quick_run_writes_a_complete_record(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    chosen = ["--only", "fuse_branches", "head", "--dtype", "float32", "bfloat16"]
    options = [*chosen, "--peers", "torchvision", "layers", "dense", "--json", str(target)]
    assert main([*QUICK_RUN, *options, "--plots", str(tmp_path / "plots")]) == 0
    found = results.read(target)
    facts = found.environment
    assert facts["device"] == "cpu"
    words = [*QUICK_RUN, *options, "--plots", str(tmp_path / "plots")]
    assert facts["command"] == " ".join(["python -m benchmarks", *words])
    assert facts["versions"]["torch"] == torch.__version__
    assert {"torchvision", "python", "dyhead_cuda"} <= facts["versions"].keys()
    assert facts["threads"] == torch.get_num_threads()
    assert found.ceilings is not None
    assert found.ceilings["copy_gb_per_s"] > 0
    assert set(found.ceilings["product_tflop_per_s"]) == {"float32", "bfloat16"}
    assert set(found.rates) == {"float32", "bfloat16"}
    names = {
        "fuse_branches": {OURS, "layer by layer"},
        "head": {OURS, "torchvision", "dense convolution"},
    }
    assert {(r.case, r.precision, r.direction, r.implementation) for r in found.rows} == {
        (case, precision, direction, name)
        for case, implementations in names.items()
        for precision in ("float32", "bfloat16")
        for direction in DIRECTIONS
        for name in implementations
    } | {("head", p, BOTH, heads.RECOMPUTE) for p in ("float32", "bfloat16")}
    for row in found.rows:
        assert row.status == results.OK, row.remark
        assert row.blocks == (2 if row.case == "head" else 1)
        assert list(row.times) == [WARM]
        assert row.times[WARM].runs == QUICK.min_runs
        assert row.bytes > 0
        assert row.memory is not None
        assert row.launches is None
        if row.implementation == "dense convolution":
            assert (row.error, row.checked) == (None, [])
        else:
            assert row.error is not None
            assert 0 < row.error < 0.3
            assert row.checked == ["small", "real"]
        halved = row.precision == "bfloat16" and row.implementation == "torchvision"
        assert row.ran_in == ("float32" if halved else row.precision)
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        f"cpu-{name}.png" for name in ("ratios", "roofline", "memory")
    }


def test_json_on_stdout_is_nothing_but_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *QUICK_RUN, "--only", "dynamic_relu", "--json", "-"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert results.from_data(json.loads(done.stdout)).rows
    assert "dynamic_relu, tiny, batch 1" in done.stderr


def _spoiled(change: Callable[[Problem], Problem]) -> Callable[[Setting], Problem]:
    original = heads.CASES["dynamic_relu"]
    return lambda setting: change(original(setting))


def _with(problem: Problem, index: int, **options: Any) -> Problem:
    changed = list(problem.implementations)
    changed[index] = replace(changed[index], **options)
    return replace(problem, implementations=changed)


def _run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Problem], Problem]
) -> tuple[int, list[Row]]:
    monkeypatch.setitem(heads.CASES, "dynamic_relu", _spoiled(change))
    target = tmp_path / "result.json"
    options = ["--only", "dynamic_relu", "--dtype", "float32", "--json", str(target)]
    status = main([*QUICK_RUN, *options])
    return status, results.read(target).rows


def test_a_wrong_result_is_reported_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def spoil(problem: Problem) -> Problem:
        run = problem.implementations[2].run

        def wrong(module: Any, inputs: Any) -> Any:
            calls.append(1)
            return [x + 0.01 for x in run(module, inputs)]

        return _with(problem, 2, run=wrong)

    status, rows = _run(tmp_path, monkeypatch, spoil)
    assert status == 1
    bad = [r for r in rows if r.status != results.OK]
    assert [(r.implementation, r.status, r.times) for r in bad] == [
        ("layer by layer", "wrong", {})
    ] * 2
    assert "at a small size: expected a relative error of the outputs" in bad[0].remark
    assert len(calls) == 3  # the check of each direction, and the shapes of its cotangents
    assert {r.implementation for r in rows if r.status == results.OK} == {OURS, "reference"}
    assert "wrong:" in capsys.readouterr().out


def test_what_is_wrong_at_real_sizes_alone_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = SHAPE_SETS["tiny"].levels

    def spoil(problem: Problem) -> Problem:
        if problem.setting.shapes.levels != levels:
            return problem
        run = problem.implementations[0].run
        return _with(problem, 0, run=lambda m, x: [y.roll(1, 3) for y in run(m, x)])

    status, rows = _run(tmp_path, monkeypatch, spoil)
    assert status == 1
    assert rows[0].status == results.WRONG
    assert rows[0].remark.startswith("expected a relative error of the outputs")


def test_a_peer_that_breaks_is_reported_and_ours_must_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no kernel\nof this")

    status, rows = _run(tmp_path, monkeypatch, lambda p: _with(p, 2, run=broken))
    assert status == 0
    bad = [r for r in rows if r.status != results.OK]
    assert {(r.implementation, r.status) for r in bad} == {("layer by layer", "failed")}
    assert bad[0].remark == "RuntimeError: no kernel"
    monkeypatch.undo()
    status, rows = _run(tmp_path, monkeypatch, lambda p: _with(p, 0, run=broken))
    assert status == 1


def test_what_there_is_no_time_for_is_skipped() -> None:
    entries = [
        runner.Entry(Setting("dynamic_relu", SHAPE_SETS["tiny"]), ("float32",)),
        runner.Entry(Setting("offset_conv", SHAPE_SETS["tiny"]), ("float32",)),
    ]
    options = runner.Options(CPU, QUICK, (WARM,), deadline=0.0)
    rows = [row for _, row in runner.run_entries(entries, options, _quietly)]
    assert [(r.case, r.direction, r.status) for r in rows] == [
        (case, direction, results.SKIPPED)
        for case in ("dynamic_relu", "offset_conv")
        for direction in DIRECTIONS
    ]


def test_a_precision_that_falls_back_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    original = runner.Runner._measure

    def spy(self: Any, row: Row, problem: Any, entry: Any, how: Any, *rest: Any) -> Row:
        measured.append((how.name, rest[0]))
        return original(self, row, problem, entry, how, *rest)

    monkeypatch.setattr(runner.Runner, "_measure", spy)
    entry = runner.Entry(
        Setting("dynamic_relu", SHAPE_SETS["tiny"]),
        ("float32", "bfloat16"),
        (FORWARD,),
        ("reference",),
    )
    rows = [r for _, r in runner.run_entries([entry], MICRO, _quietly)]
    assert measured == [(OURS, "float32"), ("reference", "float32"), (OURS, "bfloat16")]
    assert [r.precision for r in rows] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert rows[1].times == rows[3].times


@dataclass
class _NoRoom:
    """Memory in which the reference's backward does not fit."""

    forward: int

    def __call__(self, device: torch.device) -> int:
        return self.forward


def test_gradients_too_large_for_the_reference_are_checked_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = Setting("block", SHAPE_SETS["tiny"])
    problem = heads.problem_of(setting)
    forward = runner.checking.reference_bytes(problem, FORWARD)
    assert forward < runner.checking.reference_bytes(problem, BOTH)
    for room, expected in ((2 * forward, ["small", "real, outputs only"]), (forward, ["small"])):
        monkeypatch.setattr(runner.checking, "available_bytes", _NoRoom(room))
        entry = runner.Entry(setting, ("float32",), (BOTH,), ())
        rows = [r for _, r in runner.run_entries([entry], MICRO, _quietly)]
        assert [r.checked for r in rows] == [expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about a missing GPU")
def test_cuda_without_a_gpu_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--quick", "--device", "cuda"])
    assert ended.value.code == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "/nonexistent/result.json"], "existing directory"),
        (["--batch", "0"], "integer of at least 1"),
        (["--only", "resnet"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused_at_once(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --- timing and probes --------------------------------------------------------------------------


def test_timing_counts_the_runs_and_orders_the_quartiles() -> None:
    calls: list[int] = []
    effort = Effort(seconds=60, min_runs=5, max_runs=5, warmup_seconds=0)
    for method in (WARM, COLD):
        calls.clear()
        assert timing.measure(lambda: calls.append(0), CPU, effort, method).runs == 5
        assert len(calls) == 5
    assert Timing.of([1.0, 5.0, 2.0, 4.0, 3.0]) == Timing(3, 2, 4, 5)


def test_a_slow_action_gets_no_warm_up_and_few_runs() -> None:
    usual = timing.usual_effort(CPU)
    assert usual.given(0.1) == (usual, [])
    assert usual.given(1.0) == (replace(usual, warmup_seconds=0.0), [])
    effort, known = usual.given(60.0)
    assert (effort.warmup_seconds, effort.min_runs, known) == (0.0, 2, [60.0])
    calls: list[int] = []
    found = timing.measure(lambda: calls.append(0), CPU, effort, WARM, [9.0, 60.0])
    assert (found.runs, found.upper_quartile > 9, len(calls)) == (2, True, 0)


def test_a_run_is_warmed_up_for_the_time_given() -> None:
    calls: list[int] = []
    effort = Effort(seconds=0, min_runs=2, max_runs=2, warmup_seconds=0.01)
    timing.measure(lambda: calls.append(0), CPU, effort, WARM)
    assert len(calls) > 2


@dataclass
class _Event:
    name: str
    device_type: torch.autograd.DeviceType


def test_kernels_are_counted_without_copies() -> None:
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        _Event("dyhead::cuda::fuse_kernel", gpu),
        _Event("Memcpy DtoD (Device -> Device)", gpu),
        _Event("Memset (Device)", gpu),
        _Event("cudaLaunchKernel", cpu),
        _Event("at::native::elementwise", gpu),
    ]
    assert probes.count_kernels(events) == 2
    assert probes.launches(lambda: None, CPU) is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells")
def test_peak_memory_counts_what_was_freed_again() -> None:
    def run() -> torch.Tensor:
        large = torch.ones(64 * 2**18)  # 64 MiB
        return large[:1].clone()

    result, size = probes.with_peak_memory(run, CPU)
    assert result.numel() == 1
    if size is not None:
        assert 60 * 2**20 < size < 80 * 2**20


def test_rates_are_those_of_large_copies_and_products() -> None:
    found = machine.ceilings(["float32", "float64"], CPU, QUICK, quick=True)
    assert found["copy_gb_per_s"] > 0
    assert set(found["product_tflop_per_s"]) == {"float32", "float64"}
    assert all(rate > 0 for rate in found["product_tflop_per_s"].values())


def test_multiply_adds_have_a_rate_in_every_precision() -> None:
    found = fma.rates(["float64", "float32", "float16"], 1, 20)
    assert 0 < found["float64"] < found["float32"] < 100
    assert found["float16"] > 0  # no instruction: computed in float32


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_without_a_compiler_there_is_no_rate(
    compiler: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert fma.rates(["float32"], 1, 20) == {}
    assert "set CXX to a C++ compiler" in capsys.readouterr().err


def test_peers_agree_on_what_is_installed() -> None:
    assert "torchvision" in peers.deform_convs()
    assert peers.supports("torchvision", torch.float32, CPU)
    assert not peers.supports("torchvision", torch.bfloat16, CPU)


@pytest.mark.gpu
def test_a_quick_run_on_a_gpu(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    options = ["--quick", "--device", "cuda", "--graph", "--only", "dynamic_relu", "offset_conv"]
    main([*options, "--json", str(target)])
    found = results.read(target)
    assert found.environment["device"] == "cuda"
    relu = [r for r in found.rows if r.case == "dynamic_relu" and r.implementation == OURS]
    assert {r.precision for r in relu} == {"bfloat16", "float16", "tf32", "float32"}
    for row in relu:
        assert row.status == results.OK, row.remark
        assert set(row.times) == {COLD, WARM, GRAPH}, row.remark
        assert row.memory is not None
        assert (row.launches is not None) == (row.direction == FORWARD)

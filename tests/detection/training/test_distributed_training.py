"""Two processes train as one does on their joint batch, and stop, fail and resume together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dyhead_cuda.detection.training import runs
from dyhead_cuda.detection.training.parallel import Processes
from tests.helpers.compare import relative_l2
from tests.helpers.detection.distributed_trainee import WORLD, one_step
from tests.helpers.detection.runs import assert_same_run, curve
from tests.helpers.paths import ROOT

LIMIT_S = 150


def torchrun(*command: str) -> str:
    """What the processes have said."""
    # Threads that wait for each other's cores take many times longer; lo is there in any sandbox.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    process = subprocess.Popen(
        [*launch, str(WORLD), "-m", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, said[-5000:]
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    torchrun("tests.helpers.detection.distributed_trainee", str(folder))
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def test_a_step_is_that_of_the_joint_batch(results: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = one_step(tmp_path, Processes(0, 1, torch.device("cpu")), 2 * WORLD)
    assert sum(name.endswith(".grad") for name in alone) == 4
    for result in results:
        found = result["one step"]
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            assert relative_l2(found[name], expected) < 1e-6, name
    assert all(torch.equal(results[0]["one step"][n], results[1]["one step"][n]) for n in alone)


def test_all_have_the_same_average(results: list[dict[str, Any]], folder: Path) -> None:
    """Statistics of batch normalisation among it, though each has seen other images."""
    saved = runs.read_checkpoint(folder / "average" / runs.LAST)
    for result in results:
        assert result["average"].keys() == saved["model"].keys()
        for name, value in saved["model"].items():
            assert torch.equal(result["average"][name], value), name
    differing = {n for n, x in saved["unaveraged"].items() if not torch.equal(x, saved["model"][n])}
    assert {"box.weight", "norm.running_var"} <= differing


def test_only_the_first_writes_the_log(folder: Path) -> None:
    records = curve(folder / "whole")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "evaluation" in r] == [4, 8, 12]


def test_all_stop_and_resume_together(results: list[dict[str, Any]], folder: Path) -> None:
    """The signal came to one of them; each has random states of its own."""
    for result in results:
        assert "stopped after step 5 of 12" in result["interrupted"]
    states = runs.read_checkpoint(folder / "whole" / runs.LAST)["random"]
    assert len(states) == WORLD
    assert not torch.equal(states[0]["torch"], states[1]["torch"])
    assert_same_run(folder / "stopped", folder / "whole")


def test_all_fail_together(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "the loss is nan at step 3" in result["nan"]
        assert "training.lr is 0.01, got 0.5" in result["differs"]


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = (
        "--backbone timm/test_resnet.r160_in1k --channels 16 --blocks 1 --levels 3-5 --steps 2"
    )
    data = "--images 6 --val-images 3 --scene-size 64 --batch-size 2 --pictures 1 --device cpu"
    said = torchrun("dyhead_cuda", "train", *options.split(), *data.split(), "--out", str(run))
    assert said.count("average precision") == 1  # one table
    assert said.count("run folder") == 1
    assert runs.read_checkpoint(run / runs.LAST)["step"] == 2
    assert runs.read_json(run / runs.CONFIG)["processes"] == WORLD
    assert [r["epoch"] for r in curve(run) if "loss" in r] == [0, 0]
    assert (run / "pictures" / "000001.png").is_file()

"""DistributedDataParallel and FSDP2 on two processes train as one process on the whole batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import distributed_worker as worker
from tests.helpers.compare import TOLERANCE, relative_l2
from tests.helpers.paths import ROOT

LIMIT_S = 150

Results = dict[str, dict[str, Tensor] | str]


def launch(strategy: str, directory: Path) -> list[Results]:
    """What each process has computed."""
    # Threads that wait for each other's cores take many times longer; lo is there in any sandbox.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    logs = [directory / f"rank{rank}.log" for rank in range(worker.WORLD)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.helpers.distributed_worker"]
        with log.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [*command, strategy, str(rank), str(directory)],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    deadline = time.monotonic() + LIMIT_S
    try:
        # When one fails, the other would wait for it until the end.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    codes = [process.returncode for process in processes]
    said = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    assert codes == [0] * worker.WORLD, f"exit statuses {codes} within {LIMIT_S} s\n{said}"
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(worker.WORLD)]


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return launch("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fully_sharded(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return launch("fsdp", tmp_path_factory.mktemp("fsdp"))


@cache
def alone(case: str, levels: int = 3) -> dict[str, Tensor]:
    """One process on the whole batch."""
    return worker.train(worker.make_model(case), worker.batch(levels), slice(None))


def check(results: list[Results], case: str, expected: dict[str, Tensor]) -> None:
    untrained = dict(worker.make_model(case).named_parameters())
    largest = max(float(t.norm()) for name, t in expected.items() if name.endswith(".grad"))
    for rank, result in enumerate(results):
        found = result[case]
        assert not isinstance(found, str), f"rank {rank}:\n{found}"
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            error = (found[name] - tensor).norm()
            # A bias before a normalisation has a gradient whose terms cancel.
            scale = max(float(tensor.norm()), 1e-3 * largest if name.endswith("grad") else 0)
            assert error <= 2 * TOLERANCE[torch.float64] * scale, f"{name} of rank {rank}: {error}"
    steps = [relative_l2(expected[name], p.detach()) for name, p in untrained.items()]
    assert max(steps) > 1e-4


@pytest.mark.parametrize("case", worker.CASES)
def test_data_parallel(case: str, data_parallel: list[Results]) -> None:
    check(data_parallel, case, alone(case))


def test_data_parallel_with_unused_branches(data_parallel: list[Results]) -> None:
    expected = alone("DyHead", 1)
    assert "blocks.0.low.norm.weight.grad" not in expected
    renamed: list[Results] = [{"DyHead": result["one level"]} for result in data_parallel]
    check(renamed, "DyHead", expected)


@pytest.mark.parametrize("case", worker.CASES)
def test_fully_sharded(case: str, fully_sharded: list[Results]) -> None:
    check(fully_sharded, case, alone(case))


def test_fully_sharded_in_bfloat16(fully_sharded: list[Results]) -> None:
    """Parameters gathered in bfloat16, their gradients and shards in float32."""
    expected = alone("DyHead")
    for result in fully_sharded:
        found = result["bfloat16"]
        assert not isinstance(found, str), found
        assert {t.dtype for t in found.values()} == {torch.float32}
        assert found.keys() == expected.keys()
        a, b = (torch.cat([t[k].double().flatten() for k in expected]) for t in (found, expected))
        assert relative_l2(a, b) < 0.25

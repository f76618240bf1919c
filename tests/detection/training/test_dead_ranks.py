"""A process of a training dies: the others end soon, with a line that names it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dyhead_cuda.detection.training import rank_watch, runs
from tests.helpers.paths import ROOT

WORLD = 2
LIMIT_S = 100  # to start; the machine may be busy
SOON_S = 30  # to end: gloo's own limit is 30 minutes


@contextmanager
def ranks(case: str, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a training."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(WORLD):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.helpers.detection.lonely_ranks", case, str(folder)]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(path: Path) -> None:
    stop = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < stop, f"no {path.name}"
        time.sleep(0.01)


def said(process: subprocess.Popen[str]) -> list[str]:
    """What a process says until it ends, without torch's own warnings."""
    _, text = process.communicate(timeout=SOON_S)
    return [line for line in text.splitlines() if not line.startswith("[")]


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_killed_process_ends_the_others(victim: int, tmp_path: Path) -> None:
    with ranks("training", tmp_path) as processes:
        wait_for(tmp_path / "run" / runs.LAST)
        processes[victim].kill()
        survivor = processes[1 - victim]
        (line,) = said(survivor)
        assert survivor.returncode == 1
    assert f"the process of rank {victim} (pid {processes[victim].pid} on " in line
    assert "killed" in line
    assert "Run the same command again" in line
    assert runs.read_checkpoint(tmp_path / "run" / runs.LAST)["step"] > 0


def test_a_process_that_waits_for_ever_is_ended(tmp_path: Path) -> None:
    with ranks("deaf", tmp_path) as processes:
        for rank in range(WORLD):
            wait_for(tmp_path / str(rank))
        processes[1].kill()
        (line,) = said(processes[0])
        assert processes[0].returncode == rank_watch.STATUS
    assert f"the process of rank 1 (pid {processes[1].pid} on " in line


def test_a_process_that_fails_alone_is_named_with_its_error(tmp_path: Path) -> None:
    with ranks("failing", tmp_path) as processes:
        wait_for(tmp_path / "1")
        (line,) = said(processes[1])
        assert processes[1].returncode == 1
        assert processes[0].wait(SOON_S) == 1
    assert f"the process of rank 0 (pid {processes[0].pid} on " in line
    assert "has failed with OSError: the disk of rank 0 is full" in line

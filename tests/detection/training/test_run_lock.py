"""The lock of a run folder: one process at a time, whatever the one before has died of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from dyhead_cuda.detection import DataConfig, ModelConfig, TrainConfig, train
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.detection.training.run_lock import NAME, held
from tests.helpers.paths import ROOT

# Holds the lock and says so; with "fork" a child does nothing but outlive it.
HOLD = """
import os, sys, time
from pathlib import Path
from dyhead_cuda.detection.training.run_lock import held
with held(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.close(1)
        time.sleep(100)
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(params=["alone", "fork"])
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), request.param],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    with suppress(ProcessLookupError):  # the test has ended it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_another_process_is_kept_out_and_a_dead_one_is_not(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(RunError) as error, held(tmp_path):
        pass
    for text in (str(tmp_path), f"process {holder.pid} on {os.uname().nodename}", "since 20"):
        assert text in str(error.value)
    assert "--out" in str(error.value)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == holder.pid
    with held(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_the_same_thread_may_take_it_again(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with held(tmp_path):
        with held(link):
            pass
        assert (tmp_path / NAME).exists()
        refused: list[RunError] = []

        def another() -> None:
            try:
                with held(tmp_path):
                    pass
            except RunError as error:
                refused.append(error)

        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        assert len(refused) == 1
    assert not (tmp_path / NAME).exists()


def test_a_child_does_not_end_the_lock_of_its_parent(tmp_path: Path) -> None:
    with held(tmp_path):
        child = os.fork()
        if child == 0:
            try:
                with held(tmp_path):
                    os._exit(1)
            except RunError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / NAME).exists()


def test_a_name_that_cannot_be_read_is_no_traceback(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / NAME).write_text("{")
        child = os.fork()
        if child == 0:
            try:
                with held(tmp_path):
                    os._exit(1)
            except RunError as error:
                os._exit(0 if "in use by another training: another process" in str(error) else 2)
        assert os.waitpid(child, 0)[1] == 0


def test_many_at_once_hold_it_one_after_the_other(tmp_path: Path) -> None:
    """A holder removes the file, so another may have opened the one that is gone."""
    inside = tmp_path / "inside"
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            taken = 0
            while taken < 30:
                try:
                    with held(tmp_path):
                        inside.touch(exist_ok=False)  # raises where two are inside
                        time.sleep(0.0005)
                        inside.unlink()
                        taken += 1
                except RunError:
                    time.sleep(0.0003)
                except BaseException:
                    os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6


def test_a_training_takes_it(tmp_path: Path) -> None:
    model = ModelConfig("atss", 10, "timm/test_resnet.r160_in1k", last_level=5, channels=16)
    data = DataConfig("digits", {"size": [64, 64], "num_images": 1})
    config = TrainConfig(steps=1, batch_size=1, device="cpu")
    with ThreadPoolExecutor(1) as another, held(tmp_path):
        with pytest.raises(RunError, match="in use by another training"):
            another.submit(train, config, model, data, tmp_path).result()
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(RunError, match="cannot write to the run folder"), held(tmp_path):
        pass

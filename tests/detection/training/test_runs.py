"""The run folder: atomic files, the log, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from dyhead_cuda.detection import ModelConfig, TrainConfig
from dyhead_cuda.detection.training import runs
from dyhead_cuda.detection.training.runs import RunError, RunFolder

CONFIG = {"training": {"lr": 0.1, "workers": 0}, "model": {"attentions": ("scale", "task")}}
CHECKPOINT = {"step": 2, "config": CONFIG, "model": {"weight": torch.arange(5.0)}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """With a run of two steps, and a third after the checkpoint."""
    folder = RunFolder(tmp_path / "new" / "run")
    assert folder.begin(CONFIG) is None
    assert not folder.path.exists()
    folder.start(CONFIG, 0)
    for step in (1, 2):
        folder.log({"step": step, "loss": 1 / step})
    folder.save_last(CHECKPOINT)
    folder.log({"step": 3, "loss": math.inf})
    return folder


def test_a_run_goes_on_from_its_checkpoint(folder: RunFolder) -> None:
    assert folder.records()[-1] == {"step": 3, "loss": None}
    checkpoint = folder.begin(CONFIG)
    assert checkpoint is not None
    assert torch.equal(checkpoint["model"]["weight"], torch.arange(5.0))
    assert len(folder.records()) == 3
    folder.start(CONFIG, 2)
    assert folder.records() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("content", [b'{"step": 4, "lo', b'{"step": 4}'])
def test_a_line_that_was_cut_off_is_left_out(content: bytes, folder: RunFolder) -> None:
    with (folder.path / runs.LOG).open("ab") as file:
        file.write(content)
    assert [record["step"] for record in folder.records()] == [1, 2, 3]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"loss": 1}'])
def test_a_bad_line_is_an_error(line: str, folder: RunFolder) -> None:
    path = folder.path / runs.LOG
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(RunError, match=r"log\.jsonl is damaged"):
        folder.begin(CONFIG)


def test_differences_by_name() -> None:
    now: dict[str, Any] = {"training": {"lr": 0.2, "workers": 4}, "model": {}, "data": "digits"}
    assert runs.differences(CONFIG, now) == [
        "data is None, got 'digits'",
        "model.attentions is ['scale', 'task'], got None",
        "training.lr is 0.1, got 0.2",
    ]
    assert runs.differences(json.loads(json.dumps(CONFIG)), CONFIG) == []


def test_a_failed_write_leaves_what_was_there(folder: RunFolder) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    before = (folder.path / runs.LAST).read_bytes()
    with pytest.raises(OSError, match="disk full"):
        runs.write_atomically(folder.path / runs.LAST, write)
    assert (folder.path / runs.LAST).read_bytes() == before
    assert not list(folder.path.glob(".*"))


def test_leftovers_of_a_kill_are_removed(folder: RunFolder) -> None:
    leftover = folder.path / f".{runs.LAST}.123.tmp"
    leftover.write_bytes(b"half")
    RunFolder(folder.path)
    assert leftover.exists(), "it may be of a process that is writing"
    folder.begin(CONFIG)
    folder.start(CONFIG, 2)
    assert not leftover.exists()


def test_restart_deletes_the_run(folder: RunFolder) -> None:
    folder.save_best({**CHECKPOINT, "ap": 0.25})
    assert folder.best_ap() == 0.25
    assert folder.begin({"training": {"lr": 3}}, restart=True) is None
    assert folder.best_ap() == 0.25, "only once the first step is done"
    folder.start({"training": {"lr": 3}}, 0)
    assert folder.records() == []
    assert folder.best_ap() == -math.inf


def test_folders_that_cannot_be_used(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100)):
        with pytest.raises(RunError, match="cannot write to the run folder"):
            RunFolder(path).start(CONFIG, 0)
        with (
            pytest.raises(RunError, match="cannot write to the run folder"),
            RunFolder(path).lock(),
        ):
            pass
    (folder.path / runs.CONFIG).write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*config\.json"):
        folder.begin(CONFIG)
    (folder.path / runs.CONFIG).unlink()
    with pytest.raises(RunError, match=r"holds last\.pt but no config\.json"):
        folder.begin(CONFIG)


def test_a_run_without_a_checkpoint_is_none(folder: RunFolder) -> None:
    (folder.path / runs.LAST).unlink()
    other = {"training": {"lr": 0.5}}
    assert folder.begin(other) is None
    folder.start(other, 0)
    assert runs.read_json(folder.path / runs.CONFIG) == other
    assert folder.records() == []


@pytest.mark.parametrize("there", ["run", "runs"])
def test_a_folder_that_nothing_is_written_to_is_not_left(there: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    folder = RunFolder(tmp_path / "runs" / "deep" / "run")
    if there == "run":
        folder.path.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with folder.lock():
        assert (folder.path / ".lock").exists()
    assert sorted(tmp_path.rglob("*")) == before
    with folder.lock():
        folder.start(CONFIG, 0)
    assert {path.name for path in folder.path.iterdir()} == {"config.json", "log.jsonl"}


def test_settings_that_came_later_have_their_defaults() -> None:
    """Runs of before they came go on, unless other values are asked for."""
    now = {"training": TrainConfig(5).to_dict(), "model": ModelConfig("atss", 3).to_dict()}
    before = json.loads(json.dumps(now))
    for section, name in (("training", "ema"), ("training", "body_lr"), ("model", "init")):
        del before[section][name]
    assert runs.differences(runs.completed(before, now), now) == []
    now["training"]["ema"] = 0.9
    assert runs.differences(runs.completed(before, now), now) == ["training.ema is 0.0, got 0.9"]
    del before["training"]["steps"]  # has no default
    assert "training.steps is None, got 5" in str(
        runs.differences(runs.completed(before, now), now)
    )

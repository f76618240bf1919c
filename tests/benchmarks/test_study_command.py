"""``python -m benchmarks study``: it chooses rates, trains, stops, goes on and writes tables."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.readme import STUDY, markers
from benchmarks.study import runner
from benchmarks.study.results import read
from benchmarks.study.setup import QUICK, Trial
from dyhead_cuda.detection.evaluation import BOX_SUMMARY
from dyhead_cuda.detection.training.runs import RunFolder
from dyhead_cuda.detection.training.trainer import TrainingError
from tests.helpers.study import FACTS, write_searches


def job(folder: Path, deadline: float = math.inf) -> runner.Job:
    """How a training of the quick setup is done."""
    return runner.Job(QUICK, folder / "runs", folder / "results", "cpu", FACTS, deadline)


def test_the_command_trains_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin, end = markers(STUDY)
    readme = tmp_path / "README.md"
    readme.write_text(f"{begin}\nold\n{end}\n")
    folder = tmp_path / "results"
    options = ["study", "--quick", "--folder", str(tmp_path / "runs"), "--results", str(folder)]
    options += ["--only", "crop", "--device", "cpu", "--seeds", "1", "--write", str(readme)]
    assert main(options) == 2
    assert "run with --tune first" in " ".join(capsys.readouterr().err.split())
    write_searches(folder, QUICK, ["crop"])
    assert main(options) == 0
    (path,) = (folder / "runs").iterdir()
    assert path.name == "crop-seed-0.json"
    found = json.loads(path.read_text())
    assert found["lr"] == QUICK.rates[1]
    assert found["curve"][-1] == [QUICK.steps, found["summary"]["AP"]], "of the same weights"
    assert len(found["curve"]) == QUICK.evaluations
    assert set(found["summary"]) == set(BOX_SUMMARY)
    assert set(found["per_class"]) == set("0123456789")
    assert 0 <= found["agnostic_ap"] <= 1
    assert sum(level["anchors"] for level in found["positives"].values()) > 0
    assert '| high_offset="crop" | 1 |' in readme.read_text()
    assert capsys.readouterr().out.count("min left") == 1
    before = path.read_bytes()
    assert main([*options, "--costs"]) == 0
    assert set(read(folder, QUICK).costs) == {"crop"}
    assert main(options) == 0
    assert path.read_bytes() == before, "finished runs are not run again"


def test_what_is_not_finished_in_time_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = QUICK.run("plain", 0, 1e-3)
    assert runner._train_one(job(tmp_path, time.time()), trial) is None
    assert not (tmp_path / "runs").exists(), "not even begun"
    # The time is up from the second look at it, which is after the first step.
    monkeypatch.setattr(runner.time, "time", itertools.count(1.0).__next__)
    assert runner._train_one(job(tmp_path, 1.5), trial) is None
    monkeypatch.undo()
    assert not (tmp_path / "results").exists()
    (folder,) = (tmp_path / "runs" / "runs").iterdir()
    assert folder.name.startswith("plain-seed-0-")
    (step,) = RunFolder(folder).records()
    assert step["step"] == 1
    assert runner._train_one(job(tmp_path), trial) is not None
    (path,) = (tmp_path / "results" / "runs").iterdir()
    resumed = json.loads(path.read_text())
    whole = tmp_path / "whole"
    runner._train_one(job(whole), trial)
    assert json.loads((whole / "results" / "runs" / path.name).read_text()) == resumed


def test_a_rate_that_is_too_high_fails_in_the_search_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(runner, "train", fail)
    searched = QUICK.search(["plain"])
    for trial in searched:
        assert runner._train_one(job(tmp_path), trial) == "the loss is nan"
    found = read(tmp_path / "results", QUICK)
    assert {r["failed"] for r in found.searches["plain"].values()} == {"the loss is nan"}
    with pytest.raises(TrainingError, match="nan"):
        runner._train_one(job(tmp_path), Trial("plain", 0, 1e-3, QUICK.steps))


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--results", str(tmp_path / "new")]
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    assert main(["study", "--tune", *folder, "--write", str(readme)]) == 2
    assert "expected the lines" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir()), "found before the first training"
    for options, said in (
        (["--seeds", "0"], "integer of at least 1"),
        (["--only", "resnet"], "invalid choice: 'resnet'"),
        (["--tune", "--report"], "not allowed with"),
    ):
        with pytest.raises(SystemExit):
            main(["study", *folder, *options])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--tune"], []])
def test_minutes_are_a_deadline(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def train_all(job: runner.Job, trials: list[Trial], *_: Any) -> int:
        calls.append((job.deadline - time.time(), [trial.path for trial in trials]))
        return 1

    monkeypatch.setattr(runner, "train_all", train_all)
    write_searches(tmp_path, QUICK, ["dyhead-2", "plain"])
    (tmp_path / "search" / "task-lr-0.001.json").write_text("{")
    common = ["study", "--quick", "--results", str(tmp_path), "--device", "cpu", "--minutes", "2"]
    assert main([*common, *options]) == 2, "a file that cannot be read"
    (tmp_path / "search" / "task-lr-0.001.json").unlink()
    names = ["task", "dyhead-2", "plain"] if options else ["dyhead-2", "plain"]
    assert main([*common, *options, "--only", *names]) == 0
    ((left, planned),) = calls
    assert 90 < left <= 120
    assert planned == (
        [f"search/task-lr-{lr:g}" for lr in QUICK.rates]
        if options
        else [f"runs/{n}-seed-{seed}" for seed in range(3) for n in ("plain", "dyhead-2")]
    )
    missing = len(planned) - 1
    assert f"after 2 minutes, {missing} trainings are not" in capsys.readouterr().out

"""A run gets more steps: what goes on, what is said, what stays refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from dyhead_cuda.detection.training import runs, trainer
from dyhead_cuda.detection.training.recipe import learning_rate
from tests.helpers.detection.runs import assert_same_run, curve
from tests.helpers.detection.stops import stop_at
from tests.helpers.detection.trainees import recipe, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder, recipe(4, warmup_steps=0, ema=0.5))
    return folder


def test_a_finished_run_goes_on(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    config = recipe(8, warmup_steps=0, ema=0.5, eval_every=3)
    metrics = run(tmp_path, config)
    (said,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "a run of 4 steps gets 8; from step 4 on the learning rate is that of a run of 8" in said
    records = curve(tmp_path)
    assert records[:5] == curve(finished)
    rates = [r["lr"] for r in records if "lr" in r]
    assert rates[4:] == [learning_rate(config, step) for step in range(4, 8)]
    assert rates[4] > rates[3]  # which was almost 0
    assert [r["step"] for r in records if "evaluation" in r] == [4, 6, 8]
    assert metrics.summary["AP"] == records[-1]["evaluation"]["summary"]["AP"]
    assert runs.read_json(tmp_path / runs.CONFIG)["training"]["steps"] == 8
    assert runs.read_checkpoint(tmp_path / runs.LAST)["config"]["training"]["steps"] == 8
    caplog.clear()
    run(tmp_path, config)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


def test_a_longer_run_resumes_exactly(finished: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = recipe(8, warmup_steps=0, ema=0.5)
    for folder in (whole, stopped):
        shutil.copytree(finished, folder)
    run(whole, config)
    with pytest.raises(trainer.Interrupted):
        run(stopped, config, listeners=[stop_at(5)])
    run(stopped, config)
    assert_same_run(stopped, whole)


def test_fewer_steps_and_other_settings_are_refused(finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(runs.RunError, match=r"training\.steps is 4, got 3 \(a run can be made lon"):
        run(finished, recipe(3, warmup_steps=0, ema=0.5))
    with pytest.raises(runs.RunError, match=r"run of another .*: training\.lr is 0\.01, got 0\.02"):
        run(finished, recipe(8, warmup_steps=0, ema=0.5, lr=0.02))
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_run_of_before_there_were_averages_goes_on(tmp_path: Path) -> None:
    """Its description and checkpoint have none of the later settings."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    run(whole, recipe())
    with pytest.raises(trainer.Interrupted):
        run(old, recipe(), listeners=[stop_at(5)])
    checkpoint = runs.read_checkpoint(old / runs.LAST)
    description = runs.read_json(old / runs.CONFIG)
    for each in (checkpoint["config"], description):
        del each["training"]["ema"], each["training"]["body_lr"]
    runs.write_checkpoint(old / runs.LAST, checkpoint)
    (old / runs.CONFIG).write_text(json.dumps(description))
    run(old, recipe())
    assert_same_run(old, whole)
    assert runs.read_json(old / runs.CONFIG)["training"]["ema"] == 0

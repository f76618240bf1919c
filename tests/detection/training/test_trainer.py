"""The trainer: exact resume, kills, checkpoints, non-finite losses, settings."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dyhead_cuda import DyHeadBlock
from dyhead_cuda.detection.training import runs, trainer
from dyhead_cuda.detection.training.parallel import join
from tests.helpers.detection import trainees
from tests.helpers.detection.runs import assert_same_run, curve
from tests.helpers.detection.stops import stop_at
from tests.helpers.detection.trainees import IMAGES, Detector, make_trainer, recipe, run
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, recipe())
    return folder


def test_log_and_checkpoints_of_a_run(whole: Path) -> None:
    records = curve(whole)
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "evaluation" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["step"] for r in evaluations] == [4, 8, 12]
    assert records.index(evaluations[0]) == 4
    assert [r["epoch"] for r in steps] == [i * 2 // IMAGES for i in range(12)]
    for record in steps:
        assert record["loss"] == pytest.approx(sum(record["losses"].values()))
        assert record["losses"].keys() == {"centre", "size"}
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert evaluations[0]["evaluation"]["summary"]["AP50"] is None  # nan, which JSON lacks
    assert runs.read_checkpoint(whole / runs.LAST)["step"] == 12
    assert {path.name for path in whole.iterdir()} == {
        "config.json",
        "log.jsonl",
        "last.pt",
        "best.pt",
    }


@pytest.mark.parametrize("step", [1, 4, 5, 9, 11])
def test_a_resumed_run_is_the_uninterrupted_one(step: int, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(trainer.Interrupted, match="saved in"):
        run(tmp_path, recipe(), listeners=[stop_at(step)])
    stopped = runs.read_checkpoint(tmp_path / runs.LAST)["step"]
    assert stopped == step == curve(tmp_path)[-1]["step"]
    metrics = run(tmp_path, recipe())
    assert_same_run(tmp_path, whole)
    last = curve(whole)[-1]["evaluation"]
    assert metrics.summary["AP"] == last["summary"]["AP"]


def test_a_finished_run_returns_its_metrics_again(whole: Path) -> None:
    before = (whole / runs.LOG).read_bytes()
    metrics = run(whole, recipe())
    assert metrics.summary["AP"] == curve(whole)[-1]["evaluation"]["summary"]["AP"]
    assert math.isnan(metrics.summary["AP50"])
    assert (metrics.keypoints, metrics.detections) == (None, [])
    assert (whole / runs.LOG).read_bytes() == before


def test_an_evaluation_that_was_cut_off_is_repeated(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(trainees, "evaluate", fail)
        with pytest.raises(MemoryError):
            run(tmp_path, recipe())
    assert [record["step"] for record in curve(tmp_path)] == [1, 2, 3, 4]
    assert runs.read_checkpoint(tmp_path / runs.LAST)["step"] == 4
    run(tmp_path, recipe())
    assert_same_run(tmp_path, whole)


def test_the_log_is_cut_back_to_the_checkpoint(whole: Path, tmp_path: Path) -> None:
    def fail(record: dict[str, Any]) -> None:
        if record["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe(), listeners=[fail])
    with (tmp_path / runs.LOG).open("ab") as log:
        log.write(b'{"step": 9, "lo')
    assert curve(tmp_path)[-1]["step"] == 8
    assert runs.read_checkpoint(tmp_path / runs.LAST)["step"] == 6
    seen: list[int] = []
    run(tmp_path, recipe(), listeners=[lambda record: seen.append(record["step"])])
    assert seen[0] == 7
    assert_same_run(tmp_path, whole)


def test_nothing_is_lost_when_killed_at_any_time(tmp_path: Path) -> None:
    """Killed many times in a row, wherever it is, the run still becomes the whole one."""
    config = recipe(40, checkpoint_every=1)
    run(tmp_path / "whole", config)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.helpers.detection.trainees", str(folder), "40", "10"]
    # With another number of threads sums are rounded otherwise.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **threads}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=100)
    assert 20 < runs.read_checkpoint(folder / runs.LAST)["step"] <= 40
    run(folder, config)
    assert_same_run(folder, tmp_path / "whole")
    assert not list(folder.glob(".*"))


def test_an_interruption_passes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(trainer.Interrupted("stopped", 15)))
    assert (str(error), error.signal) == ("stopped", 15)


def test_another_configuration_is_refused(whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(runs.RunError) as error:
        run(whole, recipe(lr=0.02, seed=5))
    for text in ("training.lr is 0.01, got 0.02", "training.seed is 0, got 5", "--restart"):
        assert text in str(error.value)
    assert "steps" not in str(error.value)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    run(whole, recipe(checkpoint_every=7, eval_every=5))  # says how often, not what


def test_restart_deletes_the_run(tmp_path: Path) -> None:
    run(tmp_path, recipe(4))
    folder = runs.RunFolder(tmp_path)
    assert folder.begin({"training": recipe(5).to_dict()}, restart=True) is None
    assert (tmp_path / runs.LAST).exists(), "only once the first step is done"
    folder.start({"training": recipe(5).to_dict()}, 0)
    assert folder.records() == []
    assert not (tmp_path / runs.LAST).exists()
    assert folder.best_ap() == -math.inf


def test_each_group_has_its_learning_rate(tmp_path: Path) -> None:
    detector = Detector()
    detector.block = DyHeadBlock(4, 4, num_groups=2)
    config = recipe(steps=2, offset_lr=0.25)
    with join("cpu") as processes:
        trainer = make_trainer(tmp_path, config, processes, detector=detector)
        trainer.folder.begin({})
        rates: list[Any] = []
        trainer.run({}, None, [lambda record: rates.append(record.get("lr"))])
    last = [rate for rate in rates if rate is not None][-1]
    found = {group["lr"] for group in trainer.optimizer.param_groups}
    assert found == {last, last * 0.25}


def test_best_is_the_best(tmp_path: Path) -> None:
    """With a learning rate that grows too large the AP falls again."""
    config = recipe(24, eval_every=2, lr=2.0, warmup_steps=24, clip_norm=None)
    run(tmp_path, config)
    aps = {
        r["step"]: r["evaluation"]["summary"]["AP"] for r in curve(tmp_path) if "evaluation" in r
    }
    step = max(aps, key=lambda s: aps[s])
    assert step not in (min(aps), max(aps))
    best = runs.read_checkpoint(tmp_path / runs.BEST)
    assert (best["step"], best["ap"]) == (step, aps[step])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes(amp: str, tmp_path: Path) -> None:
    config = recipe(amp=amp)
    run(tmp_path / "whole", config)
    with pytest.raises(trainer.Interrupted):
        run(tmp_path / "stopped", config, listeners=[stop_at(6)])
    run(tmp_path / "stopped", config)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    losses = [r["loss"] for r in curve(tmp_path / "whole") if "loss" in r]
    assert losses[-1] < losses[0]


class Exploding(Detector):
    """The loss is nan in the third step (``once``) or from then on."""

    def __init__(self, once: bool, where: str) -> None:
        super().__init__(0)
        self.calls, self.once, self.where = 0, once, where

    def forward(self, images: Any, targets: Any = None) -> Any:
        losses = super().forward(images, targets)
        if targets is not None:
            self.calls += 1
            if self.calls == 3 or (self.calls > 3 and not self.once):
                x = self.box.bias.sum()
                # The derivative of sqrt at 0 is infinite, its value is not.
                bad = {"loss": x * math.nan, "gradient": (x - x).abs().sqrt()}[self.where]
                losses["size"] = losses["size"] + bad
        return losses


def explode(folder: Path, amp: str, once: bool, where: str) -> None:
    config = recipe(30, amp=amp, checkpoint_every=1)
    run(folder, config, detector=Exploding(once, where))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_training(where: str, tmp_path: Path) -> None:
    with pytest.raises(trainer.TrainingError, match=r"at step 3; losses: centre .*, size") as error:
        explode(tmp_path, "off", False, where)
    assert where in str(error.value)
    checkpoint = runs.read_checkpoint(tmp_path / runs.LAST)
    assert checkpoint["step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_loss_scale_skips_a_step_that_is_not_finite(tmp_path: Path) -> None:
    explode(tmp_path, "fp16", True, "loss")
    checkpoint = runs.read_checkpoint(tmp_path / runs.LAST)
    assert checkpoint["step"] == 30
    assert checkpoint["scaler"]["scale"] < 2.0**16  # its first value
    losses = [record["loss"] for record in curve(tmp_path) if "loss" in record]
    assert [i for i, loss in enumerate(losses) if loss is None] == [2]
    assert losses[-1] < losses[0]
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_loss_scale_does_not_fall_for_ever(tmp_path: Path) -> None:
    with pytest.raises(trainer.TrainingError, match=r"loss is nan at step 1\d"):
        explode(tmp_path, "fp16", False, "loss")


def test_workers_change_nothing(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(trainer.Interrupted):
        run(tmp_path, recipe(workers=2), listeners=[stop_at(5)])
    run(tmp_path, recipe(workers=1))
    assert_same_run(tmp_path, whole)

"""A training that fails before its first step is done leaves the disk as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dyhead_cuda.detection import DataConfig, DigitScenes, ModelConfig, TrainConfig, train
from dyhead_cuda.detection.training import runs
from tests.helpers.detection.trainees import Detector, recipe, run

SMALL: dict[str, Any] = {"last_level": 4, "channels": 16, "blocks": 1, "min_size": 64}
MODEL = ModelConfig("atss", 10, "timm/test_resnet.r160_in1k", max_size=64, **SMALL)
DATA = DataConfig("digits", {"size": [64, 64], "num_images": 1})
CONFIG = TrainConfig(1, batch_size=1, device="cpu")


class Unreadable(DigitScenes):
    """Scenes that cannot be read, which shows where the first is."""

    def __getitem__(self, index: int) -> Any:
        raise OSError("the disk is gone")


STARTS: dict[str, dict[str, Any]] = {
    "weights": {"model": ModelConfig("atss", 10, "resnet18", weights="BEST", **SMALL)},
    "backbone": {"model": ModelConfig("atss", 10, "resnet19", **SMALL)},
    "levels": {
        "model": ModelConfig(
            "atss", 10, "timm/test_resnet.r160_in1k", **{**SMALL, "first_level": 7, "last_level": 7}
        )
    },
    "classes": {"model": ModelConfig("atss", 3, **SMALL)},
    "device": {"config": TrainConfig(1, device="cuda")},
    "data": {"data": DataConfig("/no/such/folder")},
    "images": {"sets": (Unreadable("train", 1), DigitScenes("val", 1))},
}


def start(which: str, folder: Path) -> None:
    options = {"config": CONFIG, "model": MODEL, "data": DATA, **STARTS[which]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises((ValueError, OSError)):
            train(folder=folder, **options)


@pytest.mark.parametrize("which", STARTS)
def test_no_folder_is_left(which: str, tmp_path: Path) -> None:
    start(which, tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", STARTS)
def test_a_folder_that_was_there_is_not_touched(which: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    start(which, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class Large(Detector):
    """For whose first step memory is not enough."""

    def forward(self, images: Any, targets: Any = None) -> Any:
        raise MemoryError


@pytest.mark.parametrize("restart", [False, True])
def test_a_first_step_that_fails_leaves_the_run_before(restart: bool, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        run(tmp_path / "new", recipe(), detector=Large(), restart=restart)
    assert not (tmp_path / "new").exists()
    run(tmp_path, recipe(4))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MemoryError):
        run(tmp_path, recipe(8), detector=Large(), restart=restart)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_restart_deletes_the_run_after_its_first_step(tmp_path: Path) -> None:
    run(tmp_path, recipe(4))
    (tmp_path / runs.LOG).write_text("damaged\n")
    run(tmp_path, recipe(2, lr=0.5), restart=True)
    records = runs.RunFolder(tmp_path).records()
    assert [r["step"] for r in records] == [1, 2, 2]
    assert runs.read_checkpoint(tmp_path / runs.BEST)["step"] == 2

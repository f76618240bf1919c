"""``python -m dyhead_cuda scenes``, and the same scenes in train."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image

from dyhead_cuda import __main__ as command_line
from dyhead_cuda.commands import train_arguments as options
from dyhead_cuda.commands import train_settings
from dyhead_cuda.detection.data import CocoFolder, CutoutScenes, DataConfig, DigitScenes
from dyhead_cuda.detection.names import SPLITS

TINY = ["--images", "2", "--val-images", "1", "--scene-size", "64"]


def command(*arguments: object) -> int:
    return command_line.main([str(argument) for argument in arguments])


def settings(*given: object) -> DataConfig:
    parser = argparse.ArgumentParser()
    options.train(parser)
    return train_settings.data_config(parser.parse_args([str(each) for each in given]))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("plum", "lime"):
        Image.new("RGBA", (30, 40), "purple").save(folder / f"{name}.png")
    return folder


def test_what_is_written_is_what_is_read(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    extra = ["--seed", "5", "--keypoints", "--max-angle", "120"]
    assert command("scenes", "--out", out, *TINY, "--objects", pictures, *extra) == 0
    assert "2 images" in capsys.readouterr().out
    for split, count in zip(SPLITS, (2, 1), strict=True):
        written = CocoFolder(out, split, strict=True)
        made = CutoutScenes(
            pictures, split, count, size=(64, 64), seed=5, keypoints=True, max_angle=120
        )
        assert len(written) == count
        assert written.classes == ("lime", "plum")
        for index in range(count):
            (image, target), (expected, truth) = written[index], made[index]
            assert torch.equal(image, expected)
            for key in ("boxes", "labels", "keypoints"):
                assert torch.equal(target[key], truth[key])


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("scenes", "--out", tmp_path, *TINY, "--split", "val") == 0
    assert not (tmp_path / "train").exists()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert command("scenes", "--out", tmp_path, *TINY, "--seed", "3") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert 'without images or annotations of split "val"' in said
    assert "instances_val.json" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert command("scenes", "--out", tmp_path, *TINY, "--split", "train") == 0
    (tmp_path / "annotations" / "instances_val.json").unlink()
    assert command("scenes", "--out", tmp_path, *TINY, "--split", "val") == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max-angle", "60"], "max_angle of 0 to 45 degrees for digits"),
        (["--objects", "/no/such/folder"], "/no/such/folder is not a folder"),
    ],
)
def test_bad_options_are_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("scenes", "--out", tmp_path / "out", *TINY, *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_digits_of_train_are_as_they_were() -> None:
    usual = {"size": [128, 128], "keypoints": False, "cache": True}
    counts = {"num_images": 4000}, {"num_images": 200}
    assert settings() == DataConfig("digits", usual, *counts)
    turned = settings("--background", "photographs", "--max-angle", "40")
    more = {"size": [256, 256], "background": "photographs", "max_angle": 40.0}
    assert turned == DataConfig("digits", {**usual, **more}, *counts)
    assert isinstance(turned.open("val"), DigitScenes)


def test_objects_of_train(pictures: Path) -> None:
    config = settings("--objects", pictures, "--flip", "--val-images", "2")
    usual = {"size": [256, 256], "keypoints": False, "cache": True, "path": str(pictures)}
    assert config == DataConfig("cutouts", usual, {"num_images": 4000}, {"num_images": 2}, True)
    assert config.open("val").classes == ("lime", "plum")
    assert "mirrored digit" not in str(config)
    with pytest.raises(ValueError, match="--objects, --max-angle: only for --data digits"):
        settings("--data", pictures, "--objects", pictures, "--max-angle", "3")

"""What train takes where options are left out: for digits, for a folder, and as its help says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from dyhead_cuda.commands import train_arguments as options
from dyhead_cuda.commands import train_settings
from dyhead_cuda.detection.data import DigitScenes
from dyhead_cuda.detection.models.config import ModelConfig
from dyhead_cuda.detection.names import DETECTORS
from dyhead_cuda.detection.training.config import TrainConfig
from tests.helpers.paths import ROOT


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    options.train(made)
    return made


def settings(*given: str) -> tuple[ModelConfig, TrainConfig]:
    arguments = parser().parse_args(given)
    model = train_settings.model_config(arguments, DigitScenes("val", 1))
    return model, train_settings.train_config(arguments, images=100)


def test_digits_get_a_small_model() -> None:
    model, training = settings()
    assert model == ModelConfig(
        "atss",
        10,
        "timm/test_resnet.r160_in1k",
        channels=64,
        blocks=2,
        last_level=6,
        min_size=128,
        max_size=128,
    )
    assert training == TrainConfig(3000, lr=2e-3, eval_every=300)
    data = train_settings.data_config(parser().parse_args([]))
    assert (data.train, data.val) == ({"num_images": 4000}, {"num_images": 200})


def test_a_folder_gets_the_published_one(tmp_path: Path) -> None:
    model, training = settings("--data", str(tmp_path))
    assert model == ModelConfig("atss", 10)
    assert training == TrainConfig(1000)
    data = train_settings.data_config(parser().parse_args(["--data", str(tmp_path)]))
    assert (data.train, data.val) == ({}, {})


@pytest.mark.parametrize("data", [(), ("--data", "folder")])
def test_what_is_given_wins(data: tuple[str, ...]) -> None:
    text = "--backbone resnet18 --channels 32 --blocks 0 --levels 4-5 --lr 1 --eval-every 7"
    more = "--steps 70 --ema 0.5 --body-lr 0 --size 64 --max-size 96"
    model, training = settings(*data, *text.split(), *more.split())
    small = ModelConfig(
        "atss", 10, "resnet18", None, 4, 5, channels=32, blocks=0, min_size=64, max_size=96
    )
    assert model == small
    assert training == TrainConfig(70, lr=1, eval_every=7, ema=0.5, body_lr=0)


@pytest.mark.parametrize(
    ("given", "steps", "every"),
    [
        (["--steps", "100"], 100, 50),
        (["--steps", "2001"], 2001, 201),
        (["--epochs", "80"], 1000, 100),
        (["--data", "folder", "--epochs", "80"], 1000, None),
    ],
)
def test_a_curve_of_digits_has_points(given: list[str], steps: int, every: int | None) -> None:
    _, training = settings(*given)
    assert (training.steps, training.eval_every) == (steps, every)


@pytest.mark.parametrize("detector", DETECTORS)
def test_levels(detector: str) -> None:
    two_stage = detector.startswith("faster_rcnn")
    for data, last in (("digits", 6), ("folder", 7)):
        for given, levels in (
            ([], (2, 6) if two_stage else (3, last)),
            (["--levels", "4-5"], (4, 5)),
        ):
            model, _ = settings("--model", detector, "--data", data, *given)
            assert (model.first_level, model.last_level) == levels


def test_the_demonstration_is_the_plain_command() -> None:
    (line,) = (x for x in (ROOT / "Makefile").read_text().splitlines() if "dyhead_cuda train" in x)
    assert "train --steps $(TRAIN_STEPS) --pictures 12 --out $(TRAIN_OUT)" in line
    assert "TRAIN_STEPS ?= 3000\n" in (ROOT / "Makefile").read_text()


def actions(title: str) -> list[Any]:
    (group,) = (g for g in parser()._action_groups if g.title == title)
    return group._group_actions


def test_each_option_of_the_training_says_what_it_does_and_its_default() -> None:
    found = actions("training")
    assert len(found) >= 19
    for action in found:
        assert "(default: " in action.help, action.option_strings
        assert len(action.help.partition("(default")[0]) > 15, action.option_strings
    texts = {action.dest: action.help for group in ("model", "data") for action in actions(group)}
    for name in ("backbone", "channels", "blocks"):
        assert "for digits" in texts[name]
        assert "for a folder" in texts[name]
    assert "timm/test_resnet.r160_in1k for digits, resnet50 for a folder" in texts["backbone"]


def test_each_setting_is_documented() -> None:
    documented = str(TrainConfig.__doc__)
    for name in TrainConfig(1).to_dict():
        assert f"\n        {name}: " in documented, name

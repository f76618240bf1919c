"""Trainings from whole detectors, drawn sizes and several views, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torchvision import models

from dyhead_cuda import __main__ as command_line
from dyhead_cuda.detection.data import DigitScenes, write_coco
from dyhead_cuda.detection.training import runs
from tests.helpers.detection.runs import weights

MODEL = ["--backbone", "timm/test_resnet.r160_in1k", "--channels=16", "--blocks=1", "--levels=3-5"]
QUICK = ["--batch-size", "1", "--warmup-steps", "1", "--steps", "1", "--device", "cpu"]
DIGITS = ["--images", "2", "--val-images", "2", "--scene-size", "64"]


def command(*arguments: object) -> int:
    return command_line.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    model = ["--model", "faster_rcnn", *MODEL]
    assert command("train", *model, *QUICK, *DIGITS, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of digits in COCO's format, in which the 3 is called three."""
    folder = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        write_coco(DigitScenes(split, 2, size=(48, 64)), folder)
        path = folder / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"][3]["name"] = "three"
        path.write_text(json.dumps(content))
    return folder


def test_start_from_a_run_with_other_classes(
    trained: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, run = tmp_path / "before", tmp_path / "run"
    shutil.copytree(trained, before)
    options = ["--start-from", before, "--data", coco, *QUICK, "--lr", "1e-12", "--out", run]
    assert command("train", *options) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"start: {before}" in said
    assert "learned anew: classes three" in said
    # The same architecture and size, without an option that says so.
    config, old = (runs.read_json(folder / runs.CONFIG) for folder in (run, before))
    assert config["model"] == old["model"]
    assert config["classes"][2:5] == ["2", "three", "4"]
    new, was = weights(run), weights(before, "best.pt")
    name = "model.roi_heads.box_predictor.cls_score.weight"
    rows = (new[name] - was[name]).abs().amax(1) > 1e-6
    assert rows.nonzero().flatten().tolist() == [4]  # the background is 0

    shutil.rmtree(before)  # a run that goes on needs it no more
    assert command("train", *options) == 0
    assert command("train", *options, "--restart") == 2
    assert f"{before} is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "2"], "blocks 1, not 2: leave these options out"),
        (["--weights", "DEFAULT"], "--weights DEFAULT: the backbone's weights come from --start"),
    ],
)
def test_what_does_not_fit_its_start(
    options: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = ["--start-from", trained, *QUICK, *DIGITS, "--out", tmp_path / "run"]
    assert command("train", *start, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / runs.CONFIG).exists()


def test_weights_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(models.resnet18().state_dict(), path)
    small = ["--channels=16", "--blocks=0", "--convs=0", "--levels=3-5", *QUICK, *DIGITS]
    options = [*small, "--weights", path, "--out", tmp_path / "run"]
    assert command("train", "--backbone", "resnet34", *options) == 2
    assert "whose tensors do not fit" in capsys.readouterr().err
    run = tmp_path / "other"
    assert command("train", "--backbone", "resnet18", *options, "--out", run) == 0
    path.unlink()  # what is trained is in the run
    assert command("eval", run, "--device", "cpu") == 0


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--multi-scale", "48-80"], {"multi_scale": [48, 80]}),
        (["--scale-jitter", "0.5-1.5"], {"scale_jitter": [0.5, 1.5], "jitter_size": 64}),
    ],
)
def test_drawn_sizes(options: list[str], settings: dict[str, object], tmp_path: Path) -> None:
    assert command("train", *MODEL, *QUICK, *DIGITS, *options, "--out", tmp_path) == 0
    data = runs.read_json(tmp_path / runs.CONFIG)["data"]
    assert {name: data[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--multi-scale", "80-48"], "expected two sides from 1 to 8192 such as 480-800"),
        (["--scale-jitter", "0.1"], "expected two scales from 0.05 to 8 such as 0.1-2"),
        (["--scale-jitter", "2-1"], "scale_jitter as two positive numbers in order"),
        (["--scale-jitter", "0.1-nan"], "expected two scales"),
        (["--multi-scale", "48-80", "--scale-jitter", "0.1-2"], "not allowed with"),
        (["--multi-scale", "80-96"], "expected min_size of the model between"),
    ],
)
def test_bad_sizes(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command("train", *MODEL, *QUICK, *DIGITS, *options, "--out", tmp_path / "run")
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / runs.CONFIG).exists()


def test_several_views(trained: Path, coco: Path, tmp_path: Path) -> None:
    found = []
    for name, given in (
        ("plain", []),
        ("same", ["--scales", "1"]),
        ("several", ["--scales", "1,1.5", "--flip"]),
    ):
        path = tmp_path / f"{name}.json"
        assert command("eval", trained, "--device", "cpu", "--json", path, *given) == 0
        found.append(json.loads(path.read_text())["detections"])
    plain, same, several = found
    assert same == plain != several

    image = coco / "val" / "000001.png"
    options = ["--checkpoint", trained, "--threshold", "0", "--device", "cpu", "--out", tmp_path]
    assert command("predict", image, *options, "--scales", "0.75,1", "--flip") == 0
    assert json.loads((tmp_path / "000001.json").read_text())["detections"]


def test_bad_scales(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("1,0", "1,,2", "large"):
        with pytest.raises(SystemExit):
            command("eval", trained, "--scales", given)
        assert "expected scales from 0.05 to 8 such as 0.8,1,1.25" in capsys.readouterr().err

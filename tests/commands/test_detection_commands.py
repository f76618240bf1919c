"""train, eval and predict from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dyhead_cuda import __main__ as command_line
from dyhead_cuda.detection.data import DigitScenes, write_coco
from dyhead_cuda.detection.figures import drawing
from dyhead_cuda.detection.names import SPLITS
from dyhead_cuda.detection.trained import load_model
from dyhead_cuda.detection.training import progress, runs

MODEL = ["--backbone", "timm/test_resnet.r160_in1k", "--channels=16", "--blocks=1", "--levels=3-5"]
DATA = ["--images", "5", "--val-images", "3", "--scene-size", "64"]
QUICK = [*MODEL, "--batch-size", "2", "--warmup-steps", "1", "--device", "cpu"]


def command(*arguments: object) -> int:
    return command_line.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a two-stage detector, which finds something from the first step on."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = ["--model", "faster_rcnn", "--keypoints", "--steps", "4", "--eval-every", "2"]
    extra = ["--pictures", "2", "--tensorboard", "--out", folder]
    assert command("train", *QUICK, *DATA, *options, *extra) == 0
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in COCO's format."""
    folder = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        write_coco(DigitScenes(split, 3, size=(48, 64)), folder)
    return folder


def test_what_training_leaves(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json", "curve.png",
        "pictures", "tensorboard",
    }  # fmt: skip
    with Image.open(trained / "curve.png") as curve:
        assert len(np.unique(np.asarray(curve.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    pictures = sorted((trained / "pictures").iterdir())
    assert [path.name for path in pictures] == ["000001.png", "000002.png"]
    with Image.open(pictures[0]) as pair:
        side = 8 * 64  # the least multiple of 480 or more
        assert pair.size == (2 * side + 8, side + drawing.strip_height(side, side))
    (events,) = (trained / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
    config = runs.read_json(trained / "config.json")
    assert config["model"]["keypoints"] == 4
    assert config["classes"] == list("0123456789")


@pytest.mark.parametrize("which", ["last", "best"])
def test_eval_reproduces_what_training_wrote(
    which: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = trained if which == "best" else trained / "last.pt"
    assert command("eval", target, "--device", "cpu", "--json", tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    expected = json.loads((trained / "metrics.json").read_text())[which]
    assert found["summary"] == expected["summary"]
    assert found["per_class"] == expected["per_class"]
    assert found["keypoints"] == expected["keypoints"]
    assert found["summary"]["AR100"] > 0
    assert len(found["detections"]) > 10
    said = capsys.readouterr().out
    assert f"{100 * found['summary']['AR100']:.1f}" in said
    assert "AP of each class" in said


def test_eval_on_other_data(trained: Path, coco: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--json", tmp_path / "found.json", "--batch-size", "2"]
    assert command("eval", trained, "--data", coco, *options) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert {each["image_id"] for each in found["detections"]} <= {1, 2, 3}


def test_annotations_and_images_of_any_names(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder whose layout is none of the usual ones."""
    for split in SPLITS:
        source = coco / "annotations" / f"instances_{split}.json"
        (tmp_path / f"my {split} boxes.json").write_bytes(source.read_bytes())
        (tmp_path / "pictures" / split / "all").parent.mkdir(parents=True)
        (tmp_path / "pictures" / split / "all").symlink_to(coco / split)
    options = ["--data", tmp_path, *QUICK, "--steps=1", "--size=48", "--max-size=64"]
    options += ["--model=faster_rcnn"]  # which finds something from the first step on
    run = ["--out", tmp_path / "run"]
    named = [f"--{split}-annotations={tmp_path}/my {split} boxes.json" for split in SPLITS]
    places = [f"--{split}-images-folder={tmp_path}/pictures/{split}/all" for split in SPLITS]
    assert command("train", *options, *run) == 2
    assert "--train-annotations" in capsys.readouterr().err
    assert command("train", *options, *run, *named) == 2
    assert "--train-images-folder" in capsys.readouterr().err
    assert command("train", *options, *run, *named, *places) == 0
    data = runs.read_json(tmp_path / "run" / "config.json")["data"]
    assert data["val"]["annotations"] == str(tmp_path / "my val boxes.json")

    def found(*more: object) -> list[Any]:
        out = tmp_path / "found.json"
        assert command("eval", tmp_path / "run", "--device=cpu", "--json", out, *more) == 0
        detections: list[Any] = json.loads(out.read_text())["detections"]
        return detections

    own = found()
    where = ["--annotations", tmp_path / "my val boxes.json"]
    images = ["--images-folder", tmp_path / "pictures" / "val" / "all"]
    assert found("--data", tmp_path, *where, *images) == own
    assert found("--split", "train") != own
    shutil.copytree(coco / "val", tmp_path / "test")
    shutil.copy(coco / "annotations" / "instances_val.json", tmp_path / "test.json")
    assert found("--split", "test") == own
    assert found("--split", "test", "--data", tmp_path) == own
    assert command("eval", tmp_path / "run", *where) == 2
    assert "with --data FOLDER" in capsys.readouterr().err
    assert command("eval", tmp_path / "run", "--data", "digits", *where) == 2
    assert "only for --data FOLDER" in capsys.readouterr().err


def test_eval_refuses_other_classes(
    trained: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        source = coco / "annotations" / f"instances_{split}.json"
        content = json.loads(source.read_text())
        content["categories"][3]["name"] = "three"
        target = tmp_path / "annotations" / source.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(content))
        (tmp_path / split).symlink_to(coco / split)
    assert command("eval", trained, "--data", tmp_path) == 2
    assert "2, three, 4" in " ".join(capsys.readouterr().err.split())


def test_predict(trained: Path, coco: Path, tmp_path: Path) -> None:
    path = coco / "val" / "000002.png"
    model, _ = load_model(trained)
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    with torch.inference_mode():
        (output,) = model([pixels])
    scores = output["scores"]
    middle = len(scores) // 2
    assert scores[middle - 1] > scores[middle]
    threshold = float(scores[middle - 1] + scores[middle]) / 2

    options = ["--checkpoint", trained, "--threshold", threshold, "--device", "cpu"]
    assert command("predict", path, *options, "--out", tmp_path) == 0
    found = json.loads((tmp_path / "000002.json").read_text())
    assert (found["file"], found["width"], found["height"]) == (str(path), 64, 48)
    assert [each["score"] for each in found["detections"]] == scores[:middle].tolist()
    for i, each in enumerate(found["detections"]):
        assert each["box"] == output["boxes"][i].tolist()
        assert each["class"] == str(each["label"] - 1)
        assert np.array(each["keypoints"]).shape == (4, 3)
    with Image.open(tmp_path / "000002.png") as drawn:
        assert drawn.size == (8 * 64, 8 * 48)
        plain = image.convert("RGB").resize(drawn.size, Image.Resampling.NEAREST)
        differing = (np.asarray(drawn.convert("RGB")) != np.asarray(plain)).any(axis=2)
    assert 0.005 < differing.mean() < 0.9


def test_predict_goes_on_after_a_broken_file(
    trained: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = coco / "val" / "000001.png", tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:500])
    out = tmp_path / "out"
    assert command("predict", bad, good, "--checkpoint", trained, "--out", out) == 2
    assert f"cannot read {bad}" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"000001.png", "000001.json"}


@pytest.mark.parametrize("name", ["atss", "retinanet", "fcos", "faster_rcnn_task"])
def test_models_and_folders(name: str, coco: Path, tmp_path: Path) -> None:
    data = ["--data", coco, "--size", "48", "--max-size", "64", "--strict", "--flip"]
    run = tmp_path / "run"
    assert command("train", "--model", name, *QUICK, *data, "--epochs", "1", "--out", run) == 0
    losses = [record["loss"] for record in runs.RunFolder(run).records() if "loss" in record]
    assert len(losses) == 2  # 3 images, 2 by 2
    assert all(loss > 0 for loss in losses)


def test_options_of_the_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--shared-tower", "--convs", "2", "--anchor-scale", "4.5", "--frozen-stages", "1"]
    assert command("train", *QUICK, *DATA, *options, "--steps", "1", "--out", run) == 0
    model, config = load_model(run)
    chosen = {name: config["model"][name] for name in ("convs", "shared_tower", "anchor_scale")}
    assert chosen == {"convs": 2, "shared_tower": True, "anchor_scale": 4.5}
    assert config["model"]["frozen_stages"] == 1
    detector: Any = model
    body = detector.backbone.body
    assert not all(parameter.requires_grad for parameter in body.parameters())


def test_another_configuration_and_restart(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*QUICK, *DATA, "--steps", "1", "--out", tmp_path / "run"]
    assert command("train", *options) == 0
    assert command("train", *options, "--lr", "0.5") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "training.lr is 0.002, got 0.5" in said
    assert "--restart" in said
    assert command("train", *options, "--lr", "0.5", "--restart") == 0


def test_a_signal_ends_the_command_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def interrupting(*_: Any) -> Iterator[progress.Listener]:
        def listen(record: progress.Record) -> None:
            if record["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        yield listen

    options = [*QUICK, *DATA, "--steps", "4", "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(progress, "shown", interrupting)
        assert command("train", *options) == 128 + signal.SIGTERM
    assert "stopped after step 2 of 4" in capsys.readouterr().out
    assert command("train", *options) == 0
    said = capsys.readouterr().out
    assert "step 3/4" in said
    assert "step 2/4" not in said


def test_a_loss_that_is_not_finite_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--lr", "1e30", "--clip-norm", "0", "--steps", "5", "--optimizer", "sgd"]
    assert command("train", *QUICK, *DATA, *wild, "--out", tmp_path) == 1
    assert "at step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "yolo"], "invalid choice"),
        (["--levels", "3"], "expected two levels such as 3-7"),
        (["--levels", "7-3"], "level"),
        (["--attentions", "scale,colour"], "expected some of scale,spatial,task or none"),
        (["--blocks", "-1"], "expected an integer from 0 to 100"),
        (["--channels", "24"], "16 groups"),
        (["--frozen-stages", "-1"], "expected an integer from 0 to 100"),
        (["--frozen-stages", "5"], "expected frozen_stages from 0 (nothing is frozen) to 4"),
        (["--anchor-scale", "0"], "expected a number from 0.01"),
        (["--model", "fcos", "--anchor-scale", "4"], "fcos, which has no anchors"),
        (["--shared-tower"], "there is no tower to share"),
        (["--lr", "nan"], "expected a number from 1e-12 to 1e+30"),
        (["--steps", "0"], "expected an integer of at least 1"),
        (["--steps", "5", "--epochs", "2"], "not allowed with"),
        (["--amp", "int8"], "invalid choice"),
        (["--backbone", "vgg16"], "vgg16"),
        (["--size", "100", "--max-size", "50"], "min_size <= max_size"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--strict"], "only for --data FOLDER"),
        (["--flip"], "only for --data FOLDER"),
        (["--val-annotations", "a.json"], "--val-annotations: scenes have no files"),
        (["--train-images-folder", "a"], "--train-images-folder: scenes have no files"),
        (["--keypoints"], "keypoints 0 for the one-stage detector"),
        (["--scene-size", "8"], "expected an integer from 32 to 8192"),
    ],
)
def test_bad_options_are_one_clear_error(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command("train", *QUICK, *DATA, *options, "--out", tmp_path / "run")
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr().err
    assert status == 2
    assert message in said
    assert "Traceback" not in said


def test_options_of_digits_need_digits(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", *MODEL, "--data", coco, "--images", "4") == 2
    assert "--images: only for --data digits" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eval", "predict"])
def test_a_checkpoint_that_is_not_there(
    name: str, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = coco / "val" / "000001.png"
    arguments = [tmp_path] if name == "eval" else [image, "--checkpoint", tmp_path]
    assert command(name, *arguments) == 2
    assert "expected a checkpoint, but" in capsys.readouterr().err


def test_a_start_that_fails_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*QUICK, *DATA, "--weights", "BEST", "--out", tmp_path / "runs" / "run"]
    assert command("train", *options) == 2
    assert "got 'BEST'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_gets_more_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*QUICK, *DATA, "--ema", "0.9", "--body-lr", "0.5", "--out", tmp_path]
    assert command("train", *options, "--steps", "1") == 0
    assert command("train", *options, "--steps", "2", "--pictures", "1") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a run of 1 steps gets 2; from step 1 on the learning rate is that of a run of 2" in said
    assert json.loads((tmp_path / "metrics.json").read_text())["last"]["step"] == 2
    assert command("train", *options, "--steps", "1") == 2
    assert "training.steps is 2, got 1" in " ".join(capsys.readouterr().err.split())
    assert command("eval", tmp_path, "--device", "cpu") == 0


def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    options = ["--backbone", "timm/resnet10t", "--images", "2", "--val-images", "1"]
    assert command_line.main(["train", *options, "--out", str(tmp_path / "run")]) == 2
    assert "pip install timm" in " ".join(capsys.readouterr().err.split())

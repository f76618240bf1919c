"""Detectors in files of their own, and the one that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dyhead_cuda import __main__ as command_line
from dyhead_cuda.commands import demo_detector
from dyhead_cuda.detection import (
    ModelConfig,
    build,
    evaluate,
    load_model,
    read_start,
    write_detector,
)
from dyhead_cuda.detection.data import write_coco
from dyhead_cuda.detection.files import WriteError
from dyhead_cuda.detection.models.config import build_empty
from dyhead_cuda.detection.names import SHIPPED
from dyhead_cuda.detection.trained import SHIPPED_FILE
from dyhead_cuda.detection.training.errors import RunError

SETTINGS = ModelConfig(
    "atss", 2, "timm/test_resnet.r160_in1k", channels=16, blocks=1, last_level=5, min_size=64
)
CONFIG: dict[str, Any] = {"model": SETTINGS.to_dict(), "classes": ["cat", "dog"]}


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_detector_comes_back(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model, path = build(SETTINGS), tmp_path / "pets.safetensors"
    write_detector(path, model, CONFIG, dtype)
    found, config = load_model(path)
    assert config == CONFIG
    assert not found.training
    for name, value in model.state_dict().items():
        rounded = value.to(dtype).float() if dtype and value.is_floating_point() else value
        assert torch.equal(found.state_dict()[name], rounded)


def test_files_that_are_no_detectors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"expected the name of a \.safetensors file, got .*x\.pt"):
        write_detector(tmp_path / "x.pt", build(SETTINGS), CONFIG)
    with pytest.raises(WriteError, match="make its folder first"):
        write_detector(tmp_path / "none" / "x.safetensors", build(SETTINGS), CONFIG)
    with pytest.raises(RunError, match=r"cannot read the detector .*x\.safetensors"):
        load_model(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(RunError, match=r"cannot read the detector .*x\.safetensors"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(RunError, match="does not say what its tensors are of"):
        load_model(path)
    write_detector(path, build(SETTINGS), {**CONFIG, "classes": ["cat"]})
    with pytest.raises(RunError, match="expected the names of 2 classes"):
        load_model(path)


def test_the_one_that_comes_with_the_package() -> None:
    model, config = load_model(SHIPPED)
    assert SHIPPED_FILE.stat().st_size < 5e6
    assert config["classes"] == list("0123456789")
    # On 200 scenes it has 0.67.
    assert evaluate(model, demo_detector.scenes(24), device="cpu", batch_size=4).summary["AP"] > 0.5


def test_a_training_may_start_from_it(tmp_path: Path) -> None:
    for name in (SHIPPED, tmp_path / "pets.safetensors"):
        if name != SHIPPED:
            write_detector(name, build(SETTINGS), CONFIG)
        start, (model, config) = read_start(name), load_model(name)
        assert start.model is not None
        assert start.model == ModelConfig.from_dict(config["model"])
        assert list(start.classes or ()) == config["classes"]
        network = build_empty(start.model)
        start.load_into(network, config["classes"])
        for key, value in model.state_dict().items():
            assert torch.equal(network.state_dict()[key], value)


def test_predict_needs_no_training(tmp_path: Path) -> None:
    dataset: Any = demo_detector.scenes(1)
    write_coco(dataset, tmp_path)
    image = tmp_path / "val" / "000001.png"
    out = tmp_path / "out"
    assert command_line.main(["predict", str(image), "--out", str(out)]) == 0
    found = json.loads((out / "000001.json").read_text())["detections"]
    named = {detection["class"] for detection in found}
    assert named & {dataset.classes[label - 1] for label in dataset[0][1]["labels"].tolist()}


def test_a_folder_may_have_the_name_of_the_shipped_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SHIPPED).mkdir()
    for folder in (Path(SHIPPED), f"./{SHIPPED}"):
        with pytest.raises(RunError, match=SHIPPED):
            load_model(folder)
    assert command_line.main(["eval", f"./{SHIPPED}"]) == 2
    assert SHIPPED in capsys.readouterr().err

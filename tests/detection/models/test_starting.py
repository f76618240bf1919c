"""Trainings that start from whole detectors, of runs, published or plain, with other classes."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dyhead_cuda.detection import DataConfig, TrainConfig, load_model, train
from dyhead_cuda.detection.models import ModelConfig, build, build_empty
from dyhead_cuda.detection.models.checkpoints import atss_from_microsoft, atss_from_mmdet
from dyhead_cuda.detection.models.recipes import RECIPES
from dyhead_cuda.detection.models.starting import Start, continued, read_start
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.detection.training.runs import CONFIG, LAST, read_json
from tests.helpers.detection import published_detectors as published
from tests.helpers.detection.runs import weights

CLASSES = ("cat", "dog", "cow")
SMALL: dict[str, Any] = {
    "backbone": "timm/test_resnet.r160_in1k",
    "channels": 16,
    "blocks": 1,
    "last_level": 5,
    "min_size": 64,
    "max_size": 64,
}
DETECTORS = ("atss", "retinanet", "fcos", "faster_rcnn")


def detector(name: str = "atss", num_classes: int = 3, **options: Any) -> Any:
    return build(ModelConfig(name, num_classes, **{**SMALL, **options})).eval()


def liven(model: nn.Module) -> None:
    """Class predictors of random values, so that something is found."""
    for name, parameter in model.named_parameters():
        if name.startswith(("head.classes", "head.classification_head.cls", "roi_heads.box_pred")):
            nn.init.normal_(parameter, std=0.5)


def start_of(name: str = "atss", classes: tuple[str, ...] | None = CLASSES) -> Start:
    model = detector(name)
    liven(model)
    return Start("before", model.state_dict(), classes, ModelConfig(name, 3, **SMALL))


@pytest.mark.parametrize("name", DETECTORS)
def test_known_classes_are_found_as_before_under_their_new_labels(name: str) -> None:
    start, names = start_of(name), ("cow", "cat", "dog")
    before, after = detector(name), detector(name)
    before.load_state_dict(start.state)
    start.load_into(after, names)
    images = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        (old,), (new,) = before(images), after(images)

    def by_name(found: dict[str, Tensor], classes: tuple[str, ...]) -> list[tuple[str, float, Any]]:
        rows = zip(found["labels"], found["scores"], found["boxes"], strict=True)
        return sorted(
            (classes[int(label) - 1], round(float(score), 4), [round(float(v), 2) for v in box])
            for label, score, box in rows
        )

    assert len(old["boxes"]) > 5
    assert len(set(old["labels"].tolist())) == 3
    assert by_name(new, names) == by_name(old, CLASSES)


def test_some_classes_are_known(caplog: pytest.LogCaptureFixture) -> None:
    start, after = start_of(), detector(num_classes=2)
    drawn = after.head.classes.weight[1].clone()
    with caplog.at_level(logging.INFO, "dyhead_cuda.detection"):
        start.load_into(after, ["dog", "fox"])
    assert start.state is not None
    before = start.state["head.classes.weight"]
    assert torch.equal(after.head.classes.weight[0], before[1])
    assert torch.equal(after.head.classes.weight[1], drawn)
    rest = {k: v for k, v in after.state_dict().items() if not k.startswith("head.classes")}
    assert all(torch.equal(value, start.state[key]) for key, value in rest.items())
    assert "1 of 2 classes known" in caplog.text
    assert "learned anew: classes fox" in caplog.text


def test_the_background_is_known_with_any_class() -> None:
    start, after = start_of("faster_rcnn"), detector("faster_rcnn", 2)
    start.load_into(after, ["fox", "dog"])
    assert start.state is not None
    before, predictor = start.state, after.roi_heads.box_predictor
    assert torch.equal(
        predictor.cls_score.bias[[0, 2]], before["roi_heads.box_predictor.cls_score.bias"][[0, 2]]
    )
    boxes = before["roi_heads.box_predictor.bbox_pred.weight"]
    assert torch.equal(predictor.bbox_pred.weight[8:], boxes[8:12])
    assert not torch.equal(predictor.bbox_pred.weight[4:8], boxes[4:8])


@pytest.mark.parametrize("classes", [None, ("x", "y", "z")])
def test_unknown_classes_are_drawn_anew(
    classes: tuple[str, ...] | None, caplog: pytest.LogCaptureFixture
) -> None:
    start, after = start_of(classes=classes), detector()
    drawn = after.head.classes.weight.clone()
    start.load_into(after, CLASSES)
    assert torch.equal(after.head.classes.weight, drawn)
    assert "drawn anew: head.classes.weight, head.classes.bias" in caplog.text


def test_keypoints_depend_on_the_data(caplog: pytest.LogCaptureFixture) -> None:
    trained = detector("faster_rcnn", keypoints=4)
    config = ModelConfig("faster_rcnn", 3, **SMALL, keypoints=4)
    start = Start("before", trained.state_dict(), CLASSES, config)
    for points, said in ((0, "not taken: roi_heads.keypoint_head.0.bias"), (3, "drawn anew: roi_")):
        start.check(replace(config, keypoints=points))
        start.load_into(detector("faster_rcnn", keypoints=points), CLASSES)
        assert said in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 2}, r"backbone.dyhead.blocks.1.* is missing; .*more; .*blocks 1, not 2: leave"),
        ({"blocks": 0, "convs": 0}, "backbone.dyhead.*is not part of it"),
        ({"channels": 32}, r"has shape \[4\], not \[8\].* channels 16, not 32: leave"),
        ({"last_level": 6}, "extra_blocks.p6.* is missing"),
    ],
)
def test_what_does_not_fit_is_an_error(options: dict[str, Any], message: str) -> None:
    start = start_of()
    with pytest.raises(ValueError, match=message) as caught:
        start.check(ModelConfig("atss", 5, **{**SMALL, **options}))
    assert len(str(caught.value)) < 600
    start.check(ModelConfig("atss", 5, **SMALL))


def test_predictors_of_another_kernel_are_an_error() -> None:
    start = start_of()
    state = dict(start.state or {})
    state["head.classes.weight"] = torch.zeros(3, 16, 1, 1)
    with pytest.raises(ValueError, match=r"head\.classes.weight has shape"):
        replace(start, state=state).check(ModelConfig("atss", 5, **SMALL))


@pytest.mark.parametrize("kind", ["safetensors", "pt", "parallel"])
def test_state_dicts(kind: str, tmp_path: Path) -> None:
    model = detector()
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    path = tmp_path / ("state.safetensors" if kind == "safetensors" else "state.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        prefix = "module." if kind == "parallel" else ""
        torch.save({"model": {prefix + k: v for k, v in state.items()}}, path)
    start = read_start(path)
    assert (start.model, start.classes) == (None, None)
    assert start.state is not None
    assert start.state.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in start.state.items())


def test_files_of_other_kinds(tmp_path: Path) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="weights of a backbone alone go to --weights"):
        read_start(tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="is not there"):
        read_start(tmp_path / "nothing.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        read_start(tmp_path / "bad.safetensors")
    with pytest.raises(RunError, match="expected a checkpoint"):
        read_start(tmp_path)


PUBLISHED = [
    ("mmdet_r50", 3, lambda: published.mmdet_resnet(resnet18)),
    ("mmdet_r50_caffe", 1, lambda: published.mmdet_resnet(resnet18)),
    ("microsoft_r50", 1, published.detectron_resnet),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "kernel", "body"), PUBLISHED, ids=[each[0] for each in PUBLISHED])
def test_published(name: str, kernel: int, body: Any, tmp_path: Path) -> None:
    recipe = RECIPES[name][1]
    convert: Any
    if name.startswith("mmdet"):
        state, convert = published.mmdet_state(body(), 512, kernel), atss_from_mmdet
        checkpoint = {"state_dict": state, "meta": {"dataset_meta": {"classes": CLASSES}}}
    else:
        state, convert = published.microsoft_state(body(), (512, 1024, 2048)), atss_from_microsoft
        checkpoint = {"model": state}
    torch.save(checkpoint, tmp_path / "published.pth")
    start = read_start(tmp_path / "published.pth")
    assert start.model is not None
    assert (start.model.recipe, start.model.min_size) == (name, recipe.min_size)
    assert start.classes == (CLASSES if name.startswith("mmdet") else None)

    # As a run saves it: settings as JSON, tensors. The preprocessing is kept.
    settings = replace(start.model, min_size=64, max_size=96)
    rebuilt: Any = build_empty(ModelConfig.from_dict(json.loads(json.dumps(settings.to_dict()))))
    start.check(settings)
    replace(start, classes=CLASSES).load_into(rebuilt, CLASSES)
    expected: Any = convert(state, recipe=replace(recipe, min_size=64, max_size=96))
    image = torch.rand(3, 64, 90)
    (found,), (wanted,) = rebuilt.eval()([image]), expected([image])
    assert len(wanted["boxes"]) > 3
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert rebuilt.postprocess == expected.postprocess


def test_published_with_a_backbone_without_a_name(tmp_path: Path) -> None:
    state = published.mmdet_state(published.swin(published.MMDET, 4), published.WIDTH << 3, 1)
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match="among swin_t, swin_s, swin_b to start from"):
        read_start(tmp_path / "swin.pth")


def test_a_published_file_of_80_classes_has_coco_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "CLASSES", 80)
    state = published.mmdet_state(published.mmdet_resnet(resnet18), 512)
    torch.save({"state_dict": state}, tmp_path / "coco.pth")
    classes = read_start(tmp_path / "coco.pth").classes
    assert classes is not None
    assert (len(classes), classes[0], classes[79]) == (80, "person", "toothbrush")


def test_a_run_starts_from_another_and_goes_on_without_it(tmp_path: Path) -> None:
    one = {"num_images": 2}
    data = DataConfig("digits", {"size": [64, 64]}, train=one, val=one)
    model = ModelConfig("atss", 10, **SMALL)
    config = TrainConfig(steps=1, batch_size=1, device="cpu")
    first, second = tmp_path / "first", tmp_path / "second"
    train(config, model, data, first)
    start = read_start(first)
    assert start.model == model
    assert start.classes == tuple("0123456789")
    # Such a rate changes nothing, so what the second run has is what it started from.
    still = replace(config, lr=1e-30, steps=2, checkpoint_every=1, seed=1)
    train(still, model, data, second, start=start)
    after = weights(second)
    for name, value in weights(first, "best.pt").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(after[name], value, msg=name)
    assert read_json(second / CONFIG)["start"] == str(first)

    shutil.rmtree(first)
    again = continued(second, str(first))
    assert again == Start(str(first), None, None, model)
    assert continued(second, "other") is None
    train(still, model, data, second, start=again)
    with pytest.raises(RunError, match="start is "):
        train(still, model, data, second)
    assert load_model(second)[1]["start"] == str(first)
    (second / LAST).unlink()
    assert continued(second, str(first)) is None


def test_sizes_are_drawn_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    resize = GeneralizedRCNNTransform.resize

    def watched(self: Any, image: Tensor, target: Any = None) -> Any:
        resized = resize(self, image, target)
        (seen if self.training else evaluated).add(int(resized[0].shape[1]))
        return resized

    evaluated: set[int] = set()
    monkeypatch.setattr(GeneralizedRCNNTransform, "resize", watched)
    one = {"num_images": 2}
    data = DataConfig("digits", {"size": [64, 64]}, train=one, val=one, multi_scale=(40, 64))
    train(TrainConfig(2, 4, device="cpu"), ModelConfig("atss", 10, **SMALL), data, tmp_path)
    assert len(seen) > 3
    assert evaluated == {64}


def test_a_start_that_does_not_fit_leaves_no_run(tmp_path: Path) -> None:
    data = DataConfig("digits", {"size": [64, 64]}, train={"num_images": 1}, val={"num_images": 1})
    model = ModelConfig("atss", 10, **{**SMALL, "blocks": 2})
    with pytest.raises(ValueError, match="blocks 1, not 2"):
        train(TrainConfig(1, device="cpu"), model, data, tmp_path / "run", start=start_of())
    assert not (tmp_path / "run").exists()

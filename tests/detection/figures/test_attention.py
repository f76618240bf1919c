"""What a head attends to in a detector: right numbers, right places, readable pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dyhead_cuda import __main__ as command_line
from dyhead_cuda import backend
from dyhead_cuda.commands import attend
from dyhead_cuda.detection import trained
from dyhead_cuda.detection.figures import attention, attention_figure
from dyhead_cuda.detection.figures.attention import Frame, Observation, Point
from dyhead_cuda.detection.models.config import ModelConfig, build
from dyhead_cuda.inspect.record import blocks_of
from dyhead_cuda.modules import ATTENTIONS, DyHead
from dyhead_cuda.pyramid import HIGH_OFFSETS

STRIDES = (4, 8, 16)


class Strided(nn.Module):
    """A backbone whose levels are every fourth, eighth, ... pixel, and a head on them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.strides, self.out_channels = STRIDES, 3
        self.dyhead = DyHead(3, 3, 2, num_groups=1, **options)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.dyhead({str(s): images[..., ::s, ::s] for s in self.strides})


class Detector(nn.Module):
    """Says how bright three pixels of known levels are, and that they are 8 pixels wide."""

    SEEN = ((2, 1, 2), (0, 5, 7), (1, 4, 1))  # level, row, column

    def __init__(self, size: int = 64, **options: Any) -> None:
        super().__init__()
        self.backbone = Strided(**options)
        self.transform = GeneralizedRCNNTransform(size, size, [0.0] * 3, [1.0] * 3)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        resized, _ = self.transform(images)
        levels = list(self.backbone(resized.tensors).values())
        boxes, scores = [], []
        for level, row, column in self.SEEN:
            value = levels[level][0, :, row, column].sum()
            x, y = column * STRIDES[level], row * STRIDES[level]
            boxes.append(torch.tensor([x - 4.0, y - 4.0, x + 4.0, y + 4.0]) + 0 * value)
            scores.append(value.sigmoid())
        found = {"boxes": torch.stack(boxes), "scores": torch.stack(scores)}
        found["labels"] = torch.tensor([1, 2, 3])
        return self.transform.postprocess([found], resized.image_sizes, sizes)


def photograph(width: int = 96, height: int = 64) -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((width, height))


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture
def observation() -> Observation:
    torch.manual_seed(0)
    return attention.observe(Detector(), pixels(photograph()))


@pytest.mark.parametrize("size", [(40, 40), (160, 120), (90, 250)])
def test_a_pixel_of_a_level_is_drawn_where_it_came_from(size: tuple[int, int]) -> None:
    """A bright spot of the image is found in a level, and from there back in the image."""
    width, height = size
    transform = GeneralizedRCNNTransform(100, 180, [0.0] * 3, [1.0] * 3)
    for x, y in ((0.31 * width, 0.62 * height), (0.67 * width, 0.39 * height)):
        rows = torch.arange(height, dtype=torch.float64) + 0.5 - y
        columns = torch.arange(width, dtype=torch.float64) + 0.5 - x
        image = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * 2.5**2)).expand(3, -1, -1)
        resized, _ = transform([image])
        resized_height, resized_width = resized.image_sizes[0]
        level = resized.tensors[0, 0, ::2, ::2]
        weights = level / level.sum()
        centre = [(weights.sum(1 - i) * torch.arange(level.shape[i])).sum() for i in range(2)]
        frame = Frame((2,), size, (resized_width, resized_height))
        found = frame.to_image(0, torch.stack(centre)[None])[0]
        assert (found - torch.tensor([x, y])).abs().max() < 0.02


def test_places_in_the_image_and_pixels_of_a_level() -> None:
    frame = Frame(strides=(8, 16), image=(300, 200), resized=(600, 400))
    # Pixel (3, 5) of stride 8 is pixel (24, 40) of what was read, centre 24.5, 40.5; then half.
    assert frame.to_image(0, torch.tensor([[3.0, 5.0]])).tolist() == [[20.25, 12.25]]
    assert frame.to_level(0, 20.25, 12.25) == (3, 5)
    assert frame.to_level(0, 21.9, 10.6) == (3, 5)
    assert frame.to_level(1, 20.25, 12.25) == (2, 2)
    assert frame.to_level(1, 0, 0) == (0, 0)
    assert frame.to_level(1, 300, 200) == (24, 37)  # inside 25 x 38, never the padding
    with pytest.raises(ValueError, match="expected a point in the 300 x 200 image, got 301,4"):
        frame.to_level(0, 301, 4)


def test_the_level_of_a_detection_is_the_one_that_it_was_made_from(
    observation: Observation,
) -> None:
    levels = {int(observation.labels[i]): observation.level_of(i) for i in range(3)}
    assert levels == {label + 1: seen[0] for label, seen in enumerate(Detector.SEEN)}
    assert observation.scores.tolist() == sorted(observation.scores.tolist(), reverse=True)


def test_a_detection_is_a_point_at_its_pixel(observation: Observation) -> None:
    for index in range(3):
        point = observation.detected(index, ("one", "two"))
        label = int(observation.labels[index])
        level, row, column = Detector.SEEN[label - 1]
        assert point.level == level
        assert observation.frame.to_level(level, point.x, point.y) == (row, column)
        assert point.text.startswith(("one", "two", "class 3")[label - 1])
        assert point.box == pytest.approx(observation.boxes[index].tolist())
    with pytest.raises(ValueError, match="expected a detection from 0 to 2, got 3"):
        observation.detected(3)


def test_a_place_takes_the_level_of_the_smallest_box_around_it(observation: Observation) -> None:
    for index in range(3):
        left, _, _, bottom = observation.boxes[index].tolist()
        point = observation.place(left + 1, bottom - 1)
        assert point.level == observation.level_of(index)
        assert observation.place(left + 1, bottom - 1, 0).level == 0
    assert observation.place(95, 1).level == 0


def test_best_leaves_out_other_boxes_of_the_same_object(observation: Observation) -> None:
    assert observation.best(2) == [0, 1]
    observation.boxes[1] = observation.boxes[0] + 0.5
    assert observation.best(2) == [0, 2]


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_observed_blocks_are_those_of_the_head(high_offset: Any) -> None:
    torch.manual_seed(1)
    model = Detector(high_offset=high_offset).double()
    image = pixels(photograph()).double()
    observation = attention.observe(model, image)
    with torch.no_grad(), backend("reference"):
        levels = model.backbone(model.transform([image])[0].tensors)
    assert len(observation.blocks) == 2
    for level, ours in zip(levels.values(), observation.blocks[-1], strict=True):
        torch.testing.assert_close(ours.energy_output, level[0].norm(dim=0).float())
    point = observation.detected(0)
    assert observation.samples(1, point).keys() <= {"low", "mid", "high"}


def test_observing_leaves_the_model_as_it_was() -> None:
    model = Detector().train()
    image = pixels(photograph())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention.observe(model, image)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    outputs = model.eval()([image])[0]["scores"]
    assert outputs.requires_grad  # no hook cuts the head off any more
    (gradient,) = torch.autograd.grad(
        outputs.sum(), [blocks_of(model.backbone.dyhead)[0].mid.weight]
    )
    assert gradient.abs().sum() > 0


def test_a_detector_without_a_head_is_refused() -> None:
    model = build(ModelConfig("retinanet", 3, "resnet18", channels=16, blocks=0, convs=1))
    with pytest.raises(ValueError, match=r"expected a detector with a Dynamic Head.*RetinaNet"):
        attention.observe(model, torch.rand(3, 64, 64))


def test_the_numbers_are_json_and_say_where_the_branches_read(observation: Observation) -> None:
    points = [observation.detected(i) for i in range(2)]
    numbers = json.loads(json.dumps(attention.to_dict(observation, points)))
    assert numbers["image_size"] == [96, 64]
    assert numbers["resized_size"] == [64, 42]
    for index, block in enumerate(numbers["blocks"]):
        assert block["block"] == index + 1
        assert list(block["levels"]) == ["P2", "P3", "P4"]
        for name, level in zip(observation.level_names, observation.blocks[index], strict=True):
            there = block["levels"][name]
            assert there["gates"] == pytest.approx(level.gates, abs=1e-5)
            assert np.array(list(there["coefficients"].values())) == pytest.approx(
                level.coefficients.numpy(), abs=1e-4
            )
        for point, samples in zip(points, block["samples"], strict=True):
            mid = observation.samples(index, point)["mid"]
            expected = observation.frame.to_image(point.level, mid.positions)
            assert np.array(samples["mid"]["xy"]) == pytest.approx(expected.numpy(), abs=1e-4)


def draw(observation: Observation, points: list[Point], path: Path, **options: Any) -> np.ndarray:
    attention_figure.draw(photograph(), observation, points, path, "a title", **options)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_the_picture_has_a_row_of_each_block(observation: Observation, tmp_path: Path) -> None:
    points = [observation.detected(0)]
    both = draw(observation, points, tmp_path / "both.png")
    first, second = (draw(observation, points, tmp_path / f"{i}.png", blocks=[i]) for i in range(2))
    assert both.shape[1] == first.shape[1] == 2400
    row = len(both) - len(first)
    assert row > 170
    # The same first row, and below it panels of many colours that are another block's.
    same = (first == second).all(2)
    below = row + 20  # with the margin
    assert same[:-below].mean() > 0.99
    assert 0.4 < same[-below:].mean() < 0.95
    assert len(np.unique(first[-row:].reshape(-1, 3), axis=0)) > 500


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts in the panels of the pictures that the test draws."""
    texts: list[str] = []
    original = attention_figure.Axes.text

    def text(self: Any, x: Any, y: Any, s: str, *more: Any, **options: Any) -> Any:
        texts.append(s)
        return original(self, x, y, s, *more, **options)

    monkeypatch.setattr(attention_figure.Axes, "text", text)
    return texts


@pytest.mark.parametrize("left_out", ATTENTIONS)
def test_what_is_off_is_said_to_be(left_out: str, tmp_path: Path, written: list[str]) -> None:
    torch.manual_seed(0)
    model = Detector(attentions=[name for name in ATTENTIONS if name != left_out])
    observation = attention.observe(model, pixels(photograph()))
    assert left_out not in observation.attentions
    draw(observation, [observation.detected(0)], tmp_path / "off.png", blocks=[1])
    assert sum("off" in s for s in written) == 1


def test_samples_outside_the_image_are_counted(tmp_path: Path, written: list[str]) -> None:
    model = Detector()
    block = blocks_of(model.backbone.dyhead)[0]
    with torch.no_grad():
        block.offset_conv.weight.zero_()
        assert block.offset_conv.bias is not None
        block.offset_conv.bias[:18] = torch.tensor([0.0, 0.0] * 6 + [99.0, 0.0] * 3)
    observation = attention.observe(model, pixels(photograph()))
    finest = Point(40, 30, 0, "here")
    draw(observation, [finest], tmp_path / "far.png", blocks=[0])
    weights = torch.cat([s.weights for s in observation.samples(0, finest).values()])
    outside = int((weights == 0).sum())
    assert outside >= 3
    assert f"{outside} of {len(weights)} outside" in written


def test_what_cannot_be_drawn(observation: Observation, tmp_path: Path) -> None:
    point = observation.detected(0)
    for points in ([], [point] * 5):
        with pytest.raises(ValueError, match=f"expected 1 to 4 points, got {len(points)}"):
            draw(observation, points, tmp_path / "no.png")
    with pytest.raises(ValueError, match=r"observed image of \(96, 64\) pixels, got \(90, 60\)"):
        attention_figure.draw(photograph(90, 60), observation, [point], tmp_path / "no.png", "")


def config(detector: str, **options: Any) -> ModelConfig:
    return ModelConfig(
        detector, 3, "resnet18", channels=16, blocks=2, last_level=5, min_size=64, max_size=96,
        **options,
    )  # fmt: skip


def save(folder: Path, wanted: ModelConfig) -> Path:
    """A run with random weights, in which something is detected."""
    torch.manual_seed(0)
    model = build(wanted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.shape[0] == wanted.num_classes and name.endswith("bias"):
                parameter.zero_()  # the focal loss's prior hides all objects
    description = {"model": wanted.to_dict(), "classes": ["cup", "spoon", "plate"]}
    torch.save({"step": 1, "config": description, "model": model.state_dict()}, folder / "best.pt")
    return folder


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photograph(120, 90).save(path)
    return path


def run_attend(*arguments: object) -> int:
    return command_line.main(["attend", *map(str, arguments), "--device", "cpu"])


def test_attend_writes_a_picture_and_the_numbers(
    image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert run_attend(image_path, "--checkpoint", save(tmp_path, config("atss")), "--out", out) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["photo_attention.json", "photo_attention.png"]
    numbers = json.loads((out / "photo_attention.json").read_text())
    assert numbers["image_size"] == [120, 90]
    assert 1 <= len(numbers["points"]) <= 3
    assert len(numbers["blocks"]) == 2
    said = capsys.readouterr().out
    for point in numbers["points"]:
        left, top, right, bottom = point["box"]
        assert (point["x"], point["y"]) == ((left + right) / 2, (top + bottom) / 2)
        assert re.fullmatch(r"(cup|spoon|plate), score 0\.\d\d", point["text"])
        assert f"{point['text']} on {point['level']}" in said


class Blind(Detector):
    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (found,) = super().forward(images)
        return [{name: value[:0] for name, value in found.items()}]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Detector:
    """A small detector in place of what a checkpoint holds."""
    torch.manual_seed(0)
    model = getattr(request, "param", Detector)()
    description = {"model": {"detector": "small"}, "classes": ["cup", "spoon", "plate"]}
    monkeypatch.setattr(attend.trained, "load_model", lambda *_: (model, description))
    return model


@pytest.fixture
def not_drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Saves the seconds of drawing; holds the blocks that were to be drawn."""
    blocks: list[Any] = []
    monkeypatch.setattr(attention_figure, "draw", lambda *arguments: blocks.append(arguments[-1]))
    return blocks


def test_attend_shows_what_is_asked_for(
    loaded: Detector, image_path: Path, tmp_path: Path, not_drawn: list[Any]
) -> None:
    other = image_path.with_name("other.png")
    photograph(64, 100).save(other)
    options = [image_path, other, "--checkpoint", "run", "--out", tmp_path]
    read = tmp_path / "photo_attention.json"
    sizes = {"photo": [120, 90], "other": [64, 100]}
    assert run_attend(*options, "--box", 2, 1, "--blocks", 2) == 0
    observation = attention.observe(loaded, pixels(photograph(120, 90)))
    for name, size in sizes.items():
        numbers = json.loads((tmp_path / f"{name}_attention.json").read_text())
        assert numbers["image_size"] == size
    shown = json.loads(read.read_text())["points"]
    for index, point in zip((2, 1), shown, strict=True):
        assert point["box"] == pytest.approx(observation.boxes[index].tolist(), abs=1e-3)
    assert run_attend(*options, "--points", "30,40", "30.5,40,P4", "--blocks", "all") == 0
    shown = json.loads(read.read_text())["points"]
    assert [(point["x"], point["y"]) for point in shown] == [(30, 40), (30.5, 40)]
    assert shown[1]["level"] == "P4"
    assert not_drawn == [[1], [1], None, None]


@pytest.mark.parametrize("loaded", [Blind], indirect=True)
def test_attend_where_nothing_is_detected(
    loaded: Detector,
    image_path: Path,
    tmp_path: Path,
    not_drawn: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [image_path, "--checkpoint", "run", "--out", tmp_path]
    assert run_attend(*options) == 0
    said = capsys.readouterr().out
    assert "no object was detected, so these places are shown: place " in said
    assert "score" not in said
    points = json.loads((tmp_path / "photo_attention.json").read_text())["points"]
    assert len({(point["x"], point["y"]) for point in points}) == 3
    assert all(point["box"] is None for point in points)
    assert len(not_drawn) == 1
    assert run_attend(*options, "--points", "30,40") == 0
    assert "no object" not in capsys.readouterr().out  # nobody asked for objects
    assert run_attend(*options, "--box", "0") == 2
    assert "no object was detected" in capsys.readouterr().err


def texts_of(points: list[Point], observation: Observation, monkeypatch: pytest.MonkeyPatch) -> str:
    """The heads of the columns."""
    texts: list[str] = []
    monkeypatch.setattr(
        attention_figure._Picture, "_write", lambda _, x, y, text, **options: texts.append(text)
    )
    attention_figure.draw(photograph(), observation, points, Path("/dev/null"), "a title")
    return " ".join(texts)


def test_a_picture_of_places_does_not_speak_of_detections(
    observation: Observation, monkeypatch: pytest.MonkeyPatch
) -> None:
    detected = texts_of([observation.detected(0)], observation, monkeypatch)
    assert detected.count("detection") == 2
    assert "detection" not in texts_of([observation.place(30, 40)], observation, monkeypatch)


def test_boxes_without_area_are_no_detections() -> None:
    class Flat(Detector):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            (found,) = super().forward(images)
            best = int(found["scores"].argmax())
            boxes = torch.cat((found["boxes"][:, :2], found["boxes"][:, :2]), 1)
            chosen = (torch.arange(3) == best)[:, None]
            return [{**found, "boxes": torch.where(chosen, boxes, found["boxes"])}]

    torch.manual_seed(0)
    model = Flat()
    observation = attention.observe(model, pixels(photograph()))
    scores = Detector.forward(model, [pixels(photograph())])[0]["scores"].tolist()
    assert observation.scores.tolist() == pytest.approx(sorted(scores)[:2][::-1])


def test_two_stages_with_the_task_attention_after_the_pooling(
    image_path: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path, config("faster_rcnn_task"))
    model, _ = trained.load_model(folder)
    observation, points = attend.observe(model, photograph(120, 90), ["cup", "spoon", "plate"])
    assert observation.attentions == ("scale", "spatial")
    assert observation.task_elsewhere
    assert [len(levels) for levels in observation.blocks] == [3, 3]
    assert all(0 <= point.x <= 120 and 0 <= point.y <= 90 for point in points)
    plain = attention.observe(Detector(attentions=["scale"]), pixels(photograph()))
    assert not plain.task_elsewhere


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--box", 3], "expected a detection from 0 to 2, got 3"),
        (["--blocks", "1,3"], "expected blocks from 1 to 2, got 3"),
        (["--points", "30,40,P9"], "expected a level of P2, P3, P4, got 'P9'"),
        (["--points", "300,40"], "expected a point in the 120 x 90 image, got 300,40"),
        (["--points", *["30,40"] * 5], "expected 1 to 4 points, got 5"),
    ],
)
def test_attend_says_what_is_wrong(
    options: list[object],
    message: str,
    loaded: Detector,
    image_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [image_path, "--checkpoint", "run", "--out", tmp_path, *options]
    assert run_attend(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("*_attention.*"))


def test_attend_refuses_what_has_no_head_or_is_not_there(
    image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", tmp_path, "--out", tmp_path / "out"]
    assert run_attend(image_path, image_path.with_suffix(".jpg"), *options) == 2
    assert "whose pictures would be one file" in capsys.readouterr().err
    assert run_attend(image_path, *options) == 2
    assert "expected a checkpoint, but" in capsys.readouterr().err
    save(tmp_path, ModelConfig("atss", 3, "resnet18", channels=16, blocks=0, convs=1))
    assert run_attend(image_path, *options) == 2
    assert "expected a detector with a Dynamic Head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--points=3", "--points=3,b", "--blocks=0", "--blocks=1,x"])
def test_malformed_options_are_usage_errors(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_attend("photo.png", "--checkpoint", "run", option)
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err

"""Pictures of detections can be read: names inside, beside each other, and not too many."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from PIL import ImageColor
from torch import Tensor

from dyhead_cuda.detection.figures import drawing

NAMES = ("cup", "spoon", "plate")


def objects(boxes: list[Any], labels: list[int], scores: list[float] | None = None) -> Any:
    found = {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.tensor(labels)}
    return found if scores is None else {**found, "scores": torch.tensor(scores)}


def many(count: int) -> Any:
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) * 400
    boxes = torch.cat((corners, corners + 60), dim=1)
    return objects(boxes.tolist(), [1 + i % 3 for i in range(count)], [0.5] * count)


def coloured(picture: Tensor, label: int) -> Tensor:
    """Where the colour of a label is: bool [H, W]."""
    colour = torch.tensor(ImageColor.getrgb(drawing.COLOURS[label]))
    return (picture == colour[:, None, None]).all(0)


def test_no_more_than_the_best_are_drawn() -> None:
    image, found = torch.zeros(3, 480, 480), many(100)
    first = {name: values[:7] for name, values in found.items()}
    assert torch.equal(drawing.draw(image, found, NAMES, 7), drawing.draw(image, first, NAMES))
    usual = {name: values[: drawing.MAX_BOXES] for name, values in found.items()}
    assert torch.equal(drawing.draw(image, found, NAMES), drawing.draw(image, usual, NAMES, 999))
    assert drawing.counted(found) == f"100 objects, the best {drawing.MAX_BOXES} drawn"
    annotated = {name: found[name] for name in ("boxes", "labels")}
    assert drawing.counted(annotated, 99) == "100 objects, the first 99 drawn"
    assert drawing.counted(annotated, 100) == "100 objects"
    assert drawing.counted(objects([[0, 0, 9, 9]], [1])) == "1 object"


SIZE, FONT = (480, 360), drawing._font(1.0)


@pytest.mark.parametrize("box", [(0, 0, 20, 20), (470, 0, 480, 360), (450, 340, 480, 360)])
def test_a_name_is_inside_the_picture(box: tuple[float, ...]) -> None:
    left, top, right, bottom = drawing._place(SIZE, box, "spoon: 0.99", FONT, [])
    assert 0 <= left < right <= 480
    assert 0 <= top < bottom <= 360
    assert right - left > FONT.getlength("spoon: 0.99")


def test_names_of_one_place_are_beside_each_other() -> None:
    areas: list[drawing.Area] = []
    for _ in range(4):
        areas.append(drawing._place(SIZE, (100, 100, 400, 300), "spoon: 0.99", FONT, areas))
    for one, other in itertools.combinations(areas, 2):
        assert drawing._overlap(one, other) == 0


def test_the_area_that_two_names_share() -> None:
    assert drawing._overlap((0, 0, 4, 3), (1, 1, 9, 9)) == 6
    assert drawing._overlap((0, 0, 4, 3), (4, 0, 9, 3)) == 0
    assert drawing._overlap((0, 0, 4, 3), (9, 9, 12, 12)) == 0


def test_names_are_drawn() -> None:
    image, one = torch.zeros(3, 480, 480), objects([[100, 100, 300, 300]], [1])
    box, named = (drawing.draw(image, one, names) for names in (("",), ("spoon",)))
    assert coloured(named, 1).sum() > coloured(box, 1).sum() + 500
    assert (named != box).any(0)[:100].any(), "above the box"


def test_small_pictures_are_enlarged_and_large_ones_have_large_letters() -> None:
    assert drawing.draw(torch.rand(3, 48, 64), objects([], []), NAMES).shape == (3, 384, 512)
    assert drawing.draw(torch.rand(3, 300, 200), objects([], []), NAMES).shape == (3, 600, 400)
    heights = []
    for side in (900, 2700):
        picture = drawing.draw(
            torch.zeros(3, side, side), objects([[600, 600, 800, 800]], [1]), ("",)
        )
        above = coloured(picture, 1)[:600, :].any(1)
        heights.append(int(above.sum()))
    assert heights[1] == pytest.approx(3 * heights[0], abs=4)


def test_a_class_that_is_a_number_is_called_a_class() -> None:
    image, box = torch.zeros(3, 480, 480), [100, 100, 300, 300]
    digit = drawing.draw(image, objects([box], [1]), ("9",))
    assert torch.equal(digit, drawing.draw(image, objects([box], [1]), ("class 9",)))
    assert not torch.equal(digit, drawing.draw(image, objects([box], [1]), ("class 8",)))


def test_a_panel_has_its_title_above() -> None:
    pixels = torch.full((3, 200, 300), 7, dtype=torch.uint8)
    titled = drawing.panel(pixels, "annotated: 3 objects")
    height = drawing.strip_height(300, 200)
    assert titled.shape == (3, 200 + height, 300)
    assert torch.equal(titled[:, height:], pixels)
    ink = (titled[:, :height] < 128).all(0)
    assert 100 < ink.sum() < 0.5 * ink.numel()
    long = drawing.panel(pixels, "predicted: 100 objects, 30 drawn (above 0.3)")
    assert not (long[:, :height, -2:] < 128).any(), "the title does not fit"

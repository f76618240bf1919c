"""Photographs behind scenes: no file of both splits, all of the picture, a change of colours."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from dyhead_cuda.detection.data import DigitScenes, backgrounds
from dyhead_cuda.detection.names import SPLITS


def test_no_photograph_is_in_both_splits() -> None:
    names = [name for split in SPLITS for name in backgrounds.PHOTOGRAPHS[split]]
    assert len(set(names)) == len(names)
    for split in SPLITS:
        pictures = backgrounds.photographs(split)
        assert len(pictures) == len(backgrounds.PHOTOGRAPHS[split])
        assert all(min(picture.size) >= 300 and picture.mode == "RGB" for picture in pictures)


def test_a_part_may_come_from_anywhere_and_keeps_its_shape() -> None:
    """A picture whose red is the place from the left, and whose green that from the top."""
    across, down = np.meshgrid(np.arange(200), np.arange(100))
    picture = Image.fromarray(np.stack((across, 2 * down, 0 * down), 2).astype(np.uint8))
    rng = np.random.default_rng(0)
    ways, widths = set(), []
    for _ in range(60):
        part = np.asarray(backgrounds.part(rng, (40, 20), [picture])).astype(float)
        assert part.shape == (40, 20, 3)
        ways.add(bool(part[20, 0].sum() < part[20, -1].sum()))
        widths.append(abs(part[:, -1] - part[:, 0]).sum())
        assert part[-1].sum() > part[0].sum()  # never upside down
    assert ways == {True, False}
    assert max(widths) > 2 * min(widths)


def test_digits_on_photographs() -> None:
    plain, photographs = (
        DigitScenes("val", 8, size=(96, 96), background=background, clutter=0, glyphs=(1, 1))
        for background in ("paper", "photographs")
    )
    rough = []
    for dataset in (plain, photographs):
        images = [dataset.scene(index).image.astype(float) for index in range(8)]
        assert all(image.shape == (96, 96, 3) for image in images)
        rough.append(np.mean([abs(np.diff(image, axis=1)).max(2).std() for image in images]))
    assert rough[1] > 1.3 * rough[0]
    assert "background" not in plain.coco["info"]["description"]


def test_scenes_on_photographs_are_the_same_everywhere() -> None:
    scene = DigitScenes("val", 9, size=(256, 256), background="photographs").scene(3)
    assert scene.labels.tolist() == [4, 0]
    assert scene.boxes.tolist() == [[49, 28, 215, 185], [208, 141, 255, 225]]
    np.testing.assert_allclose(scene.image.mean((0, 1)), (118.214, 163.151, 125.578), atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "sky"}, "background to be one of"),
        ({"max_angle": 50}, r"max_angle of 0 to 45 degrees for digits"),
        ({"max_angle": -1}, r"max_angle of 0 to 45 degrees for digits"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitScenes("train", 1, **options)  # type: ignore[arg-type]


def test_photographs_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    backgrounds.photographs.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="run pip install scikit-image"):
        DigitScenes("train", 1, background="photographs")
    DigitScenes("train", 1)

"""Positive anchors of each level, against the detector's own."""

from __future__ import annotations

import pytest
import torch

from dyhead_cuda.detection import ATSS, DigitScenes, ModelConfig, build, positives_per_level
from dyhead_cuda.detection.models import atss
from dyhead_cuda.detection.models.adapters import PyramidAnchors
from dyhead_cuda.detection.models.atss_assigner import assign

TINY = {"backbone": "timm/test_resnet.r160_in1k", "channels": 16, "blocks": 0, "convs": 0}


def config(detector: str = "atss") -> ModelConfig:
    return ModelConfig(detector, 10, **TINY, last_level=6, min_size=136, max_size=200)  # type: ignore[arg-type]


def test_they_are_those_that_the_loss_is_computed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    # Resized, and padded at both sides: P6 is rounded up, and has objects by smaller anchors.
    dataset = DigitScenes("train", 4, size=(120, 150), heights=(40, 120))
    model = build(config())
    assert isinstance(model, ATSS)
    model.anchors = PyramidAnchors(model.anchors.strides, (2,), center_offset=0.5)
    expected = torch.zeros(4, dtype=torch.int64)

    def watched(anchors: list[torch.Tensor], boxes: torch.Tensor, topk: int) -> torch.Tensor:
        nonlocal expected
        owners = assign(anchors, boxes, topk)
        parts = owners.split([len(level) for level in anchors])
        expected = expected + torch.stack([(part >= 0).sum() for part in parts])
        return owners

    monkeypatch.setattr(atss, "assign", watched)
    for index in range(3):
        image, target = dataset[index]
        model([image], [target])
    counts = positives_per_level(model, dataset, images=3)
    assert list(counts) == ["P3", "P4", "P5", "P6"]
    assert list(counts.values()) == expected.tolist()
    assert counts["P6"] > 0
    assert sum(positives_per_level(model, dataset).values()) > sum(counts.values())


def test_a_configuration_will_do() -> None:
    dataset = DigitScenes("train", 2)
    counts = positives_per_level(config(), dataset)
    assert counts == positives_per_level(build(config()), dataset)
    assert counts["P3"] > 0


def test_what_cannot_be_counted() -> None:
    dataset = DigitScenes("train", 1)
    with pytest.raises(ValueError, match=r"expected an ATSS, .* got FCOS"):
        positives_per_level(config("fcos"), dataset)
    with pytest.raises(ValueError, match="images"):
        positives_per_level(config(), dataset, images=0)

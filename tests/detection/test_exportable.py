"""Detectors as functions of one tensor find what the detectors find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dyhead_cuda.detection import export_checks as checks
from dyhead_cuda.detection.export_files import ExportError
from dyhead_cuda.detection.models.exportable import Raw, exportable, most
from dyhead_cuda.detection.names import DETECTORS, ONE_STAGE
from tests.helpers.detection.finders import make


def assert_same(model: nn.Module, height: int, width: int) -> int:
    """Boxes and labels are equal bit by bit; returns how many there are.

    Scores may differ in the last bits: torch's sigmoid may round the last values of a tensor, which
    fill no vector, differently.
    """
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    expected = checks.eager(model, raw=False)(image)
    with torch.no_grad():
        found = exportable(model)(image)
    assert found.keys() == expected.keys()
    last_bits = 4 * torch.finfo(torch.float32).eps
    for name, x in expected.items():
        tolerance = last_bits if name == "scores" else 0
        torch.testing.assert_close(found[name], x, rtol=tolerance, atol=0)
    return len(expected["scores"])


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (100, 75)])
def test_detections_are_those_of_the_detector(detector: str, height: int, width: int) -> None:
    assert assert_same(make(detector), height, width) > 10


def test_both_ways_of_atss() -> None:
    model: Any = make("atss")
    found = {}
    for model.postprocess in ("mmdet", "microsoft"):
        model.candidates = 40  # fewer than there are, so that the ranking matters
        found[model.postprocess] = assert_same(model, 64, 96)
    assert min(found.values()) > 10


def test_thresholds_and_boxes_in_the_padding() -> None:
    atss: Any = make("atss")
    atss.detections = 1000
    # Small boxes: those of anchors beyond the image have no part in it, and are dropped.
    atss.head.boxes.bias.data[2:] = -10
    assert assert_same(atss, 33, 33) > 5
    fcos: Any = make("fcos")
    fcos.detections_per_img, fcos.score_thresh = 1000, 0.5  # as many are above as below
    fcos.head.regression_head.bbox_reg.bias.data.fill_(1)  # most boxes have an area
    assert assert_same(fcos, 33, 33) > 5


@pytest.mark.parametrize("detector", ["atss", "fcos", "faster_rcnn"])
def test_nothing_is_found(detector: str) -> None:
    model: Any = make(detector)
    if detector == "atss":
        model.score_threshold = 1.0
    elif detector == "fcos":
        model.score_thresh = 1.0
    else:
        model.roi_heads.score_thresh = 1.0
    assert assert_same(model, 64, 64) == 0


@pytest.mark.parametrize("detector", ONE_STAGE)
def test_raw_predictions_lead_to_the_boxes(detector: str) -> None:
    model: Any = make(detector)
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        raw = exportable(model, raw=True)(image)
        boxes = exportable(model)(image[:1])["boxes"]
    assert set(raw) == {"logits", "deltas", "anchors", "centerness"} - (
        {"centerness"} if detector == "retinanet" else set()
    )
    decode = model.box_coder.decode if detector == "fcos" else model.box_coder.decode_single
    decoded = decode(raw["deltas"][0], raw["anchors"]).clamp(min=0)
    decoded[:, 0::2].clamp_(max=96)
    decoded[:, 1::2].clamp_(max=64)
    shift = (boxes[:, None] - decoded).abs().amax(2)  # from each detection to each anchor's box
    assert shift.amin(1).max() < 1e-4


def test_what_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match="expected a one-stage detector for raw outputs"):
        exportable(make("faster_rcnn"), raw=True)
    with pytest.raises(ValueError, match="expected ATSS, RetinaNet, FCOS or FasterRCNN"):
        exportable(nn.Conv2d(3, 3, 1))
    assert isinstance(exportable(make("fcos"), raw=True), Raw)


def test_most_fills_up() -> None:
    values, index = most(torch.tensor([0.5, -3.0, 2.0]), 5)
    assert values.tolist() == [2.0, 0.5, -3.0, -torch.inf, -torch.inf]
    assert index[:3].tolist() == [2, 0, 1]
    assert index.max() <= 2


def detections(count: int) -> dict[str, torch.Tensor]:
    corner = 20.0 * torch.arange(count)[:, None].expand(-1, 2)
    scores, labels = torch.linspace(0.9, 0.1, count), torch.arange(count) % 3 + 1
    return {"boxes": torch.cat([corner, corner + 15], 1), "scores": scores, "labels": labels}


def test_near_detections_agree_in_any_order() -> None:
    expected = detections(20)
    order = torch.arange(20).flip(0)
    found = {name: x[order] for name, x in expected.items()}
    found["boxes"] = found["boxes"] + 0.01
    agreement = checks.compare(found, expected, longer_side=400)
    assert (agreement.paired, agreement.detections) == (20, 20)
    assert agreement.errors["boxes"] == pytest.approx(0.01, rel=1e-2)
    # One in ten may come or go.
    checks.compare({name: x[:18] for name, x in expected.items()}, expected, 400)
    checks.compare(expected, {name: x[:18] for name, x in expected.items()}, 400)


@pytest.mark.parametrize("name", ["boxes", "scores", "labels", "fewer", "more", "none", "type"])
def test_other_detections_do_not(name: str) -> None:
    expected, found = detections(20), detections(20)
    if name == "boxes":
        found[name][:3] += 1.0
    elif name == "scores":
        found[name][:3] += 0.01
    elif name == "labels":
        found[name][:3] += 1
    elif name == "type":
        found["labels"] = found["labels"].int()
    else:
        found = detections({"fewer": 17, "more": 23, "none": 0}[name])
    with pytest.raises(ExportError):
        checks.compare(found, expected, longer_side=400)


def test_a_detection_has_one_partner() -> None:
    same = {name: x[:1].expand(20, *x.shape[1:]) for name, x in detections(20).items()}
    with pytest.raises(ExportError, match="of these only 1 have"):
        checks.compare(detections(20), same, longer_side=400)


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_other_raw_predictions_do_not_agree(change: float) -> None:
    expected = {"logits": torch.ones(2, 5, 3), "deltas": torch.ones(2, 5, 4)}
    assert checks.compare(expected, expected, 64).errors == {"logits": 0, "deltas": 0}
    found = {**expected, "deltas": expected["deltas"] + change}
    with pytest.raises(ExportError, match="relative error of deltas"):
        checks.compare(found, expected, 64)
    with pytest.raises(ExportError, match="expected outputs"):
        checks.compare({"logits": expected["logits"]}, expected, 64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("detector", ONE_STAGE)
def test_raw_outputs_can_be_traced_for_all_sizes(detector: str) -> None:
    model = exportable(make(detector), raw=True).eval()
    with torch.no_grad():
        trace = torch.jit.trace(model, (torch.rand(1, 3, 64, 96),), strict=False)
        for shape in ((1, 3, 64, 96), (2, 3, 128, 160)):
            images = torch.rand(shape)
            expected = model(images)
            found = trace(images)
            assert found.keys() == expected.keys()
            for name, x in expected.items():
                torch.testing.assert_close(found[name], x)

"""Anchors on exact strides, predictions in float32, and what is said about wrong inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from dyhead_cuda.detection.models.adapters import PyramidAnchors, check_images, check_targets, widen
from tests.helpers.detection.small_scenes import empty_target, scenes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchors_are_multiples_of_the_stride(dtype: torch.dtype) -> None:
    anchors = PyramidAnchors((32, 64, 128), (4, 8), (0.5, 1.0, 2.0))
    images = ImageList(torch.zeros(2, 3, 96, 160), [(90, 150), (96, 160)])
    # 96 pixels are two levels of stride 64: torchvision would take a stride of 48.
    levels = [torch.zeros(2, 1, *size, dtype=dtype) for size in ((3, 5), (2, 3), (1, 2))]
    first, second = anchors(images, levels)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    assert first.shape == (6 * (15 + 6 + 2), 4)
    start = 0
    for level, stride in zip(levels, (32, 64, 128), strict=True):
        height, width = level.shape[-2:]
        boxes = first[start : start + 6 * height * width].view(height, width, 6, 4)
        start += 6 * height * width
        centers = (boxes[..., :2] + boxes[..., 2:]) / 2
        for y in range(height):
            for x in range(width):
                expected = torch.tensor([x * stride, y * stride]).expand(6, 2)
                assert torch.equal(centers[y, x], expected.float())
        sizes = (boxes[..., 2:] - boxes[..., :2])[0, 0]  # width, height: ratio-major
        sides = torch.tensor([4.0, 8.0] * 3) * stride
        ratios = torch.tensor([0.5, 1.0, 2.0]).repeat_interleave(2)
        torch.testing.assert_close(sizes.prod(1).sqrt(), sides, rtol=0.02, atol=0)
        torch.testing.assert_close(sizes[:, 1] / sizes[:, 0], ratios, rtol=0.03, atol=0)


class _Predictor(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": x, "b": [x + 1, (x + 2,)]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_widened_predictions(given: torch.dtype, expected: torch.dtype) -> None:
    x = torch.randn(5, dtype=given)
    found = widen(_Predictor())(x)
    for value, raw in ((found["a"], x), (found["b"][0], x + 1), (found["b"][1][0], x + 2)):
        assert value.dtype == expected
        assert torch.equal(value, raw.to(expected))


def change(**values: Any) -> dict[str, Any]:
    return {**scenes()[1][1], **values}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"boxes": torch.zeros(0, 4)}, r"in target 1, \['labels', 'keypoints'\] missing"),
        (change(boxes=torch.zeros(4)), r"boxes \[n, 4\] in target 1, got torch.float32 \[4\]"),
        (change(boxes=torch.zeros(2, 4).long()), "floating-point boxes.*int64"),
        (change(labels=torch.tensor([1])), r"int64 labels \[2\].*got torch.int64 \[1\]"),
        (change(labels=torch.ones(2)), "got torch.float32"),
        (change(labels=torch.tensor([1, 0])), r"1\.\.2 \(0 is background\), got 0 in target 1"),
        (change(labels=torch.tensor([3, 1])), "got 3 in target 1"),
        (change(boxes=torch.tensor([[1.0, 1, 2, 2], [3, 1, 3, 2]])), r"got \[3.0, 1.0, 3.0, 2.0\]"),
        (change(boxes=torch.tensor([[1.0, 1, 2, torch.nan]] * 2)), "finite boxes.*nan"),
        (change(boxes=torch.tensor([[1.0, 1, 2, torch.inf]] * 2)), "finite boxes.*inf"),
        (change(keypoints=torch.zeros(2, 3, 3)), r"keypoints \[2, 2, 3\].*got .* \[2, 3, 3\]"),
        (change(keypoints=torch.zeros(2, 2, 3).double()), "float32 keypoints"),
    ],
)
def test_wrong_targets(target: dict[str, Any], message: str) -> None:
    images, targets = scenes()
    check_targets(images, targets, 2, 2)
    with pytest.raises(ValueError, match=message):
        check_targets(images, [targets[0], target], 2, 2)


def test_targets_need_what_the_model_learns_only() -> None:
    images, targets = scenes()
    plain = [{key: t[key] for key in ("boxes", "labels")} for t in targets]
    check_targets(images, plain, 2)
    check_targets(images, [empty_target(2)] * 2, 2, 2)
    with pytest.raises(ValueError, match="'keypoints'"):
        check_targets(images, plain, 2, 2)
    for few in (None, targets[:1]):
        with pytest.raises(ValueError, match="a target for each of 2 images"):
            check_targets(images, few, 2)
    with pytest.raises(ValueError, match="at least one image"):
        check_targets([], [], 2)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(1, 8, 8),
        torch.zeros(8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8),
    ],
)
def test_wrong_images(image: Tensor) -> None:
    check_images([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match=r"\[3, H, W\] in 0..1, got .* for image 1"):
        check_images([torch.zeros(3, 8, 8), image])

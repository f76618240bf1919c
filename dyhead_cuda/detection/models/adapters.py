"""Fixes for torchvision's detectors on any pyramid and in any precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from dyhead_cuda.numerics import to_compute

Target = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


class Pixels(NamedTuple):
    """How images are normalised, from RGB in 0..1."""

    mean: Sequence[float]
    std: Sequence[float]


IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the usual one


def pixels_of(backbone: nn.Module) -> Pixels:
    """What a backbone expects: its attributes image_mean and image_std, or else the usual one."""
    mean, std = (getattr(backbone, f"image_{name}", None) for name in Pixels._fields)
    return IMAGENET if mean is None or std is None else Pixels(list(mean), list(std))


class PyramidAnchors(AnchorGenerator):
    """Anchors at multiples of each level's stride.

    torchvision divides the image's size by the level's, which is not the stride where a level was
    rounded up (images are padded to 32 pixels, levels have strides up to 128), and has anchors in
    the precision of the features, where bfloat16 is whole pixels off.

    Args:
        strides: of each level, in pixels.
        scales: sides of the anchors, in strides.
        ratios: height over width; the area is kept.
        center_offset: an anchor's centre is (x + center_offset, y + center_offset) strides.

    ``forward`` returns for each image float32 anchors [A, 4], xyxy in pixels.
    """

    def __init__(
        self,
        strides: Sequence[int],
        scales: Sequence[float],
        ratios: Sequence[float] = (1.0,),
        center_offset: float = 0.0,
    ) -> None:
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(ratios),) * len(sizes))
        self.strides, self.center_offset = tuple(strides), center_offset

    def levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The anchors of each level [N, C, H_l, W_l]: float32 [A_l, 4], xyxy in pixels."""
        self.set_cell_anchors(torch.float32, features[0].device)
        grids = [list(feature.shape[-2:]) for feature in features]
        levels = self.grid_anchors(grids, [[stride, stride] for stride in self.strides])
        return [
            level + self.center_offset * stride
            for level, stride in zip(levels, self.strides, strict=True)
        ]

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        return [torch.cat(self.levels(feature_maps))] * len(image_list.image_sizes)


def has_area(boxes: Tensor) -> Tensor:
    """Which boxes [n, 4], xyxy, are wider and higher than nothing: bool [n]."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def check_anchor_scale(scale: float | None) -> None:
    """Raise ValueError unless ``scale`` can be the side of an anchor in strides, or is None."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(
            "expected anchor_scale as a positive number of strides, or None for the published "
            f"one, got {scale!r}"
        )


def anchor_side(scale: float | None, published: float) -> float:
    """The side of an anchor in strides: ``scale`` after its check, or if it is None, published."""
    check_anchor_scale(scale)
    return published if scale is None else scale


def _widened(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _widened(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_widened(value) for value in values)
    return to_compute(values)


def _widen_output(module: nn.Module, arguments: Any, output: Any) -> Any:
    return _widened(output)


def widen(predictor: M) -> M:
    """Make ``predictor`` return at least float32, also under autocast.

    Boxes are computed from it: rounded to bfloat16 they would be off by pixels.
    """
    predictor.register_forward_hook(_widen_output)
    return predictor


class CheckedDetector(nn.Module):
    """Mixin in front of a torchvision detector: arguments are checked before anything runs.

    The class has ``num_classes`` (without background) and ``num_keypoints``.
    """

    num_classes: int
    num_keypoints: int = 0

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """Losses in training, detections in evaluation, as torchvision's detectors give them.

        Args:
            images: float [3, H, W] each, RGB in 0..1, of any sizes.
            targets: in training one for each image: boxes, float [n, 4] (x1, y1, x2, y2 in
                pixels), labels, int64 [n] in 1..num_classes, and for a detector with keypoints
                keypoints, float32 [n, K, 3] (x, y, visible); n may be 0.

        Returns:
            In training a dict of scalar losses. In evaluation for each image boxes, float32 [m, 4]
            in its pixels, scores, float32 [m], labels, int64 [m], and maybe keypoints, float32
            [m, K, 3].

        Raises:
            ValueError: images or targets that do not fit, before anything runs.
        """
        check_images(images)
        run: Callable[..., Any] = super().forward
        if self.training:
            check_targets(images, targets, self.num_classes, self.num_keypoints)
            return run(list(images), list(targets or ()))
        return run(list(images)) if len(images) else []


def check_images(images: Sequence[Tensor]) -> None:
    """Raise ValueError unless each image is a floating-point tensor [3, H, W] with pixels."""
    for i, image in enumerate(images):
        fits = image.dim() == 3 and image.shape[0] == 3 and image.numel() > 0
        if not fits or not image.is_floating_point():
            raise ValueError(
                f"expected images as floating-point tensors [3, H, W] in 0..1, got "
                f"{image.dtype} {list(image.shape)} for image {i}"
            )


def check_targets(
    images: Sequence[Tensor],
    targets: Sequence[Target] | None,
    num_classes: int,
    num_keypoints: int = 0,
) -> None:
    """Raise ValueError unless there is a target for each image that a detector can train on.

    See :mod:`dyhead_cuda.detection` for what a target has.
    """
    if not len(images):
        raise ValueError("expected at least one image to train on, got none")
    if targets is None or len(targets) != len(images):
        got = "none" if targets is None else str(len(targets))
        raise ValueError(f"expected a target for each of {len(images)} images, got {got}")
    for i, target in enumerate(targets):
        _check_target(i, target, num_classes, num_keypoints)


def _check_target(i: int, target: Target, num_classes: int, num_keypoints: int) -> None:
    keys = ("boxes", "labels", "keypoints") if num_keypoints else ("boxes", "labels")
    missing = [key for key in keys if key not in target]
    if missing:
        raise ValueError(f"expected {', '.join(keys)} in target {i}, {missing} missing")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(
            f"expected floating-point boxes [n, 4] in target {i}, got {boxes.dtype} "
            f"{list(boxes.shape)}; an image without objects has boxes [0, 4]"
        )
    count = len(boxes)
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise ValueError(
            f"expected int64 labels [{count}] in target {i}, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    # NaN fails the comparison, so it is refused too.
    good = (boxes[:, :2] < boxes[:, 2:]).all(1) & boxes.isfinite().all(1)
    if not good.all():
        raise ValueError(
            f"expected finite boxes with x1 < x2 and y1 < y2, got {boxes[~good][0].tolist()} "
            f"in target {i}; leave such boxes out"
        )
    good = (labels >= 1) & (labels <= num_classes)
    if not good.all():
        raise ValueError(
            f"expected labels in 1..{num_classes} (0 is background), got "
            f"{int(labels[~good][0])} in target {i}"
        )
    if num_keypoints:
        keypoints = target["keypoints"]
        expected = (count, num_keypoints, 3)
        if keypoints.shape != expected or keypoints.dtype != torch.float32:
            raise ValueError(
                f"expected float32 keypoints {list(expected)} (x, y, visible) in target {i}, "
                f"got {keypoints.dtype} {list(keypoints.shape)}"
            )

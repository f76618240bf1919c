"""Test-time augmentation: what a detector finds in several views of an image, merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from dyhead_cuda import checks

Found = dict[str, Tensor]


class TestTimeAugmentation(nn.Module):
    """A detector that sees each image at several scales, and its mirror images, in evaluation.

    The detections of all views of an image are merged by non-maximum suppression of each class: of
    boxes that overlap, the one of the best score stays as it is. With one scale of 1 and without
    ``flip`` the detector's own results are returned.

    Args:
        detector: of :func:`~dyhead_cuda.detection.models.build`, or another one of torchvision's
            interface whose ``transform`` resizes images.
        scales: by which the detector's ``min_size`` and ``max_size`` are multiplied, one view each.
        flip: have the mirror image of each view as another one. Not for keypoints (mirrored, a left
            elbow is a right one).
        nms_threshold: a box is dropped for a better one of its class with a greater IoU.
        detections: kept in each image.

    Raises:
        ValueError: no scale or one that is not positive, mirror images for a detector of keypoints,
            a threshold outside 0..1 or fewer than 1 detection.

    Source: the views of detectron2's ``GeneralizedRCNNWithTTA`` and mmdet's ``DetTTAModel``, which
    merges like this.

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import ModelConfig, TestTimeAugmentation, build
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5, "min_size": 64, "max_size": 64}
        >>> model = build(ModelConfig("atss", 3, "timm/test_resnet.r160_in1k", **small))
        >>> views = TestTimeAugmentation(model, scales=(1.0, 1.5), flip=True).eval()
        >>> (found,) = views([torch.rand(3, 64, 64)])
        >>> sorted(found)
        ['boxes', 'labels', 'scores']
    """

    __test__ = False  # the name is no test's

    def __init__(
        self,
        detector: nn.Module,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        *,
        nms_threshold: float = 0.6,
        detections: int = 100,
    ) -> None:
        super().__init__()
        checks.positive(detections=detections)
        if not len(scales) or not all(0 < scale < float("inf") for scale in scales):
            raise ValueError(f"expected one or more positive scales, got {tuple(scales)}")
        if not 0 <= nms_threshold <= 1:
            raise ValueError(f"expected nms_threshold from 0 to 1, got {nms_threshold}")
        keypoints: Any = getattr(detector, "num_keypoints", None)
        if flip and keypoints:
            raise ValueError(
                "expected a detector without keypoints to flip images (mirrored, a left elbow is a "
                f"right one), got one of {keypoints}; turn flipping off"
            )
        self.detector = detector
        self.scales, self.flip = tuple(scales), flip
        self.nms_threshold, self.detections = nms_threshold, detections

    def forward(self, images: Sequence[Tensor]) -> list[Found]:
        """Detections.

        Args:
            images: float [3, H, W] each, RGB in 0..1, of any sizes.

        Returns:
            For each image what the detector returns for it, at most ``detections``, best first.

        Raises:
            RuntimeError: in training mode.
            ValueError: images that do not fit.
        """
        if self.training:
            raise RuntimeError(
                "expected evaluation mode for several views of an image, got training mode; call "
                "eval(), and train the detector inside"
            )
        if self.scales == (1.0,) and not self.flip:
            return self.detector(images)
        views: list[list[Found]] = []
        for scale in self.scales:
            with _resized(self.detector.transform, scale):
                views.append(self.detector(images))
                if self.flip:
                    found = self.detector([image.flip(-1) for image in images])
                    pairs = zip(found, images, strict=True)
                    views.append([_mirrored(each, image.shape[-1]) for each, image in pairs])
        return [self._merged(of_image) for of_image in zip(*views, strict=True)]

    def _merged(self, views: Sequence[Found]) -> Found:
        found = {name: torch.cat([view[name] for view in views]) for name in views[0]}
        keep = batched_nms(found["boxes"], found["scores"], found["labels"], self.nms_threshold)
        return {name: values[keep[: self.detections]] for name, values in found.items()}


def _mirrored(found: Found, width: int) -> Found:
    left, top, right, bottom = found["boxes"].unbind(1)
    return {**found, "boxes": torch.stack((width - right, top, width - left, bottom), dim=1)}


@contextmanager
def _resized(transform: Any, scale: float) -> Iterator[None]:
    """Has a detector resize images to its own sizes times ``scale`` inside."""
    before = transform.min_size, transform.max_size
    transform.min_size = tuple(max(1, round(size * scale)) for size in before[0])
    transform.max_size = max(1, round(before[1] * scale))
    try:
        yield
    finally:
        transform.min_size, transform.max_size = before

"""What a data set gives a detector to learn from."""

from __future__ import annotations

import math

import torch
from torch import nn

from dyhead_cuda import checks
from dyhead_cuda.detection.data.base import DetectionDataset
from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.atss_assigner import assign
from dyhead_cuda.detection.models.config import ModelConfig, build_empty


@torch.no_grad()
def positives_per_level(
    model: nn.Module | ModelConfig, dataset: DetectionDataset, images: int | None = None
) -> dict[str, int]:
    """How many anchors of each level of the pyramid an ATSS is trained on as objects.

    Levels without any are not trained to find objects, and a Dynamic Head has nothing to exchange
    with them.

    Args:
        model: an :class:`ATSS` on a :class:`Pyramid`, or its configuration, of which no weights
            are downloaded.
        dataset: what it is to be trained on.
        images: look at the first ones only (default: all).

    Returns:
        By the name of the level, finest first: "P3" has a stride of 8 pixels.

    Raises:
        ValueError: another detector, or ``images`` below 1.

    Example:
        >>> from dyhead_cuda.detection import DigitScenes, ModelConfig, positives_per_level
        >>> tiny = {"backbone": "timm/test_resnet.r160_in1k", "channels": 16, "blocks": 1}
        >>> config = ModelConfig("atss", 10, **tiny, last_level=5, min_size=128, max_size=128)
        >>> counts = positives_per_level(config, DigitScenes("train", 2))
        >>> list(counts), counts["P3"] > counts["P5"]
        (['P3', 'P4', 'P5'], True)
    """
    if isinstance(model, ModelConfig):
        model = build_empty(model)
    if not isinstance(model, ATSS):
        raise ValueError(
            f"expected an ATSS, whose anchors are assigned to objects, got {type(model).__name__}"
        )
    checks.positive(images=len(dataset) if images is None else images)
    strides = model.anchors.strides
    totals = torch.zeros(len(strides), dtype=torch.int64)
    for index in range(min(len(dataset), images or len(dataset))):
        image, target = dataset[index]
        batch, (resized,) = model.transform([image], [target])
        height, width = batch.tensors.shape[-2:]
        # Each level halves the one before and rounds up, so no features need to be computed.
        maps = [torch.empty(1, 1, math.ceil(height / s), math.ceil(width / s)) for s in strides]
        levels = model.anchors.levels(maps)
        owners = assign(levels, resized["boxes"].float(), model.topk)
        parts = (owners >= 0).split([len(level) for level in levels])
        totals += torch.stack([part.sum() for part in parts])
    names = [f"P{stride.bit_length() - 1}" for stride in strides]
    return dict(zip(names, totals.tolist(), strict=True))

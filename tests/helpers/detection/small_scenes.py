"""A backbone of three convolutions, scenes of coloured boxes, and training on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

Target = dict[str, Tensor]


class SmallPyramid(nn.Module):
    """Levels of strides 4, 8, ..., each a strided convolution of the one before."""

    def __init__(self, channels: int = 16, strides: Sequence[int] = (4, 8, 16)) -> None:
        super().__init__()
        self.out_channels, self.strides, self.num_levels = channels, tuple(strides), len(strides)
        self.stem = nn.Conv2d(3, channels, 7, stride=strides[0], padding=3)
        self.deeper = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in strides[1:]
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        levels = [self.stem(images).relu()]
        for convolution in self.deeper:
            levels.append(convolution(levels[-1]).relu())
        return OrderedDict((str(i), x) for i, x in enumerate(levels))


def scenes() -> tuple[list[Tensor], list[Target]]:
    """Two images [3, 64, 64] of a red box (label 1) and a green one (label 2) each.

    Keypoints are 4 pixels inside the upper left and lower right corner.
    """
    images, targets = [], []
    places = [((4, 6, 28, 26), (34, 30, 60, 58)), ((34, 36, 58, 62), (6, 4, 30, 30))]
    for seed, boxes in enumerate(places):
        image = 0.2 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
        for colour, (x1, y1, x2, y2) in enumerate(boxes):
            image[colour, y1:y2, x1:x2] += 0.8
        corners = [[[a + 4, b + 4, 1], [c - 4, d - 4, 1]] for a, b, c, d in boxes]
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor([1, 2]),
            "keypoints": torch.tensor(corners, dtype=torch.float32),
        }
        images.append(image)
        targets.append(target)
    return images, targets


def empty_target(keypoints: int = 0) -> Target:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "keypoints": torch.zeros(0, keypoints, 3),
    }


def overfit(make: Callable[[], nn.Module], steps: int, rate: float = 0.003) -> Any:
    """The detector after ``steps`` on :func:`scenes`, in evaluation."""
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    images, targets = scenes()
    for _ in range(steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
    return model.eval()


def assert_found(model: nn.Module, least_overlap: float = 0.6) -> list[dict[str, Tensor]]:
    """Each object of the scenes is the best detection of its label; returns these."""
    images, targets = scenes()
    with torch.no_grad():
        predictions = model(images)
    best = []
    for found, target in zip(predictions, targets, strict=True):
        chosen = torch.stack(
            [found["scores"].where(found["labels"] == c, -1).argmax() for c in (1, 2)]
        )
        assert found["labels"][chosen].tolist() == [1, 2]
        overlap = box_iou(found["boxes"][chosen], target["boxes"]).diagonal()
        assert overlap.min() > least_overlap, overlap
        best.append({key: value[chosen] for key, value in found.items()})
    return best

"""A detection head in the style of Ultralytics' YOLO: a list of levels in, a list out.

The neck of a YOLO gives three levels of different widths. A 1x1 convolution brings each to one
width, a Dynamic Head works on all of them together, and two small branches per level predict the
boxes (as distributions of four distances) and the classes.

    python examples/yolo_head.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyhead_cuda import DyHead


def conv(channels: int, out_channels: int, size: int) -> nn.Sequential:
    """Convolution, batch normalisation and SiLU, of which YOLO is built."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(inplace=True),
    )


class DetectDyHead(nn.Module):
    """Predictions on every level of a pyramid whose levels differ in width.

    Args:
        classes: number of classes.
        widths: channels of the levels that come in, finest first.
        channels: width of the head, a multiple of 16.
        blocks: of the Dynamic Head; YOLO forks have one or two.
        bins: of the distribution of each of the four distances.

    ``forward`` takes a list of levels [N, widths[l], H_l, W_l], each half of the finer one, and
    returns a list of [N, 4 * bins + classes, H_l, W_l], boxes first.
    """

    def __init__(
        self,
        classes: int = 80,
        widths: tuple[int, ...] = (64, 128, 256),
        channels: int = 64,
        blocks: int = 2,
        bins: int = 16,
    ) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(conv(width, channels, 1) for width in widths)
        self.dyhead = DyHead(channels, channels, blocks)
        self.boxes = nn.ModuleList(
            nn.Sequential(conv(channels, channels, 3), nn.Conv2d(channels, 4 * bins, 1))
            for _ in widths
        )
        self.classes = nn.ModuleList(
            nn.Sequential(conv(channels, channels, 3), nn.Conv2d(channels, classes, 1))
            for _ in widths
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [reduce(x) for reduce, x in zip(self.reduce, features, strict=True)]
        levels = self.dyhead(levels)
        return [
            torch.cat([boxes(x), classes(x)], 1)
            for boxes, classes, x in zip(self.boxes, self.classes, levels, strict=True)
        ]


def main() -> None:
    """Predictions for two images of 256 x 320 pixels, and one step of training."""
    torch.manual_seed(0)
    head = DetectDyHead(classes=3)
    sizes = [(256 // stride, 320 // stride) for stride in (8, 16, 32)]
    features = [torch.randn(2, c, *size) for c, size in zip((64, 128, 256), sizes, strict=True)]
    outs = head(features)
    for out in outs:
        print(list(out.shape))
    torch.stack([out.square().mean() for out in outs]).sum().backward()
    print("parameters with a gradient:", sum(p.grad is not None for p in head.parameters()))


if __name__ == "__main__":
    main()

"""The structure of forks of Ultralytics' YOLO: mmdet's block with a fully connected dynamic ReLU.

The detection head takes a list of levels of other widths, and a convolution brings each to the
width of the blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from tests.helpers.published import dyconv, mmdet


class h_sigmoid(nn.Module):
    """Without the height that microsoft's has as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + 3) / 6


class DyReLU(dyconv.DYReLU):
    """microsoft's, under another name."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.fc[3] = h_sigmoid()


class DyHeadBlock(mmdet.DyHeadBlock):
    """Takes a list of levels and returns a list; one width in and out."""

    def __init__(self, channels: int, zero_init_offset: bool = True) -> None:
        super().__init__(channels, channels, zero_init_offset)
        self.task_attn_module = DyReLU(channels)  # type: ignore[assignment]


# The forks write the class anew and do not derive it from mmdet's.
DyHeadBlock.forward = mmdet.DyHeadBlock.forward  # type: ignore[method-assign]


class DetectDyHead(nn.Module):
    """A detection head: list in, list out."""

    def __init__(self, widths: tuple[int, ...], channels: int, num_blocks: int) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.dyhead = nn.Sequential(
            *(DyHeadBlock(channels, zero_init_offset=False) for _ in range(num_blocks))
        )

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return self.dyhead([conv(level) for conv, level in zip(self.conv, x, strict=True)])

"""What published configurations of ATSS detectors set and their checkpoints do not contain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dyhead_cuda import checks
from dyhead_cuda.detection.models.checkpoint_names import MICROSOFT_ATSS, MMDET_ATSS, Source

FAMILIES, CHANNEL_ORDERS = ("resnet", "swin"), ("rgb", "bgr")


@dataclass(frozen=True)
class Recipe:
    """The settings of a published configuration that a state dict does not contain.

    Args:
        family: of the backbone, "resnet" or "swin".
        kernel_size: of the predictors, 1 or 3.
        pixel_mean, pixel_std: of pixels in 0..255, in the order of ``channels``.
        channels: the order in which the network takes them, "rgb" or "bgr".
        stride_in_1x1: whether a ResNet stage halves its input in its first 1x1 convolution (caffe's
            style) and not in the 3x3 one.
        center_offset, size_divisible, min_size, max_size: see :class:`ATSS`.

    Raises:
        ValueError: an unknown ``family`` or order of ``channels``.

    Source: the configurations of mmdet 3.3.0 and microsoft/DynamicHead that the constants name.

    Example:
        >>> from dataclasses import replace
        >>> from dyhead_cuda.detection import MMDET_R50
        >>> replace(MMDET_R50, min_size=640, max_size=1066).size_divisible
        32
    """

    family: Literal["resnet", "swin"]
    kernel_size: int
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channels: Literal["rgb", "bgr"] = "rgb"
    stride_in_1x1: bool = False
    center_offset: float = 0.5
    size_divisible: int = 128
    min_size: int = 800
    max_size: int = 1333

    def __post_init__(self) -> None:
        checks.one_of("family", self.family, FAMILIES)
        checks.one_of("channels", self.channels, CHANNEL_ORDERS)

    def detector_settings(self) -> dict[str, Any]:
        """The settings of :class:`ATSS` that follow, other than of sizes; for RGB in 0..1.

        For a recipe of BGR the first convolution of the checkpoint is turned instead.
        """
        mean, std = (
            [value / 255 for value in (values[::-1] if self.channels == "bgr" else values)]
            for values in (self.pixel_mean, self.pixel_std)
        )
        return {
            "kernel_size": self.kernel_size,
            "center_offset": self.center_offset,
            "image_mean": mean,
            "image_std": std,
            "size_divisible": self.size_divisible,
        }


#: mmdet ``atss_r50_fpn_dyhead_1x_coco``.
MMDET_R50 = Recipe("resnet", 3, center_offset=0.0, size_divisible=32)
_CAFFE: dict[str, Any] = {
    "pixel_mean": (103.53, 116.28, 123.675),
    "pixel_std": (1.0, 1.0, 1.0),
    "channels": "bgr",
    "stride_in_1x1": True,
}
#: mmdet ``atss_r50-caffe_fpn_dyhead_1x_coco``, once called ``..._for_reproduction_1x_coco``.
MMDET_R50_CAFFE = Recipe("resnet", 1, **_CAFFE)
#: mmdet ``atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco``.
MMDET_SWINL = Recipe("swin", 1, min_size=1200, max_size=2000)
#: microsoft/DynamicHead ``dyhead_r50_atss_fpn_1x``.
MICROSOFT_R50 = Recipe("resnet", 1, **_CAFFE)
#: microsoft/DynamicHead ``dyhead_swint_atss_fpn_2x_ms``.
MICROSOFT_SWINT = Recipe("swin", 1)

#: By the names that configurations have: the code base whose checkpoints it reads, and the recipe.
RECIPES: dict[str, tuple[Source, Recipe]] = {
    "mmdet_r50": (MMDET_ATSS, MMDET_R50),
    "mmdet_r50_caffe": (MMDET_ATSS, MMDET_R50_CAFFE),
    "mmdet_swinl": (MMDET_ATSS, MMDET_SWINL),
    "microsoft_r50": (MICROSOFT_ATSS, MICROSOFT_R50),
    "microsoft_swint": (MICROSOFT_ATSS, MICROSOFT_SWINT),
}


def halve_in_first_convolutions(pyramid: nn.Module) -> None:
    """Moves the stride of ResNet stages to the first 1x1 convolution, as caffe's models have it."""
    for stage in ("layer2", "layer3", "layer4"):
        block: Any = pyramid.get_submodule(f"body.{stage}.0")
        if hasattr(block, "conv3"):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

